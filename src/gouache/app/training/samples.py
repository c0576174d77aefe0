"""Pictures painted while a run trains, with equal seeds at every moment, and a contact sheet that grows with them."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from gouache.errors import RequestError
from gouache.files.write import write_atomic
from gouache.generate import run
from gouache.generate.request import Request
from gouache.images import pixels
from gouache.images.sheet import sheet
from gouache.model.model import Model
from gouache.training.run_settings import SampleSettings

SHEET = "sheet.png"
_NAME = re.compile(r"step-(\d{8})-(\d{2})\.png")
_MOST_ROWS = 40  # of the sheet; older moments are thinned out


class Samples:
    """Paints `requests` with the weights that `model` has now and saves them in `folder`."""

    def __init__(self, model: Model, requests: Sequence[Request], folder: Path) -> None:
        self._model, self._requests, self._folder = model, requests, folder

    def paint(self, step: int) -> Path:
        """The pictures after `step` steps; returns the contact sheet. Raises GouacheError if they cannot be painted."""
        for number, request in enumerate(self._requests):
            picture = next(iter(run.paint(self._model, request)))
            picture.save(self._folder / f"step-{step:08d}-{number:02d}.png")
        return self._write_sheet()

    def _write_sheet(self) -> Path:
        found: dict[int, dict[int, Path]] = {}
        for path in self._folder.iterdir():
            if match := _NAME.fullmatch(path.name):
                found.setdefault(int(match[1]), {})[int(match[2])] = path
        steps = _thinned(sorted(found))
        columns = [request.prompt for request in self._requests]
        rows = [[_opened(found[step].get(number)) for number in range(len(columns))] for step in steps]
        path = self._folder / SHEET
        picture = sheet(columns, [f"step {step}" for step in steps], rows)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        write_atomic(path, buffer.getvalue())
        return path


def requests_of(settings: SampleSettings, default: str, size: tuple[int, int], clip_skip: int) -> list[Request]:
    """The samples' requests: the model's own defaults, at the training pictures' size. Raises RequestError."""
    changed = {
        **({"steps": settings.steps} if settings.steps else {}),
        **({"sampler": settings.sampler} if settings.sampler else {}),
        **({"clip_skip": clip_skip} if clip_skip else {}),
    }
    return [
        Request(prompt=prompt, negative=settings.negative, seed=settings.seed + number, size=size, **changed)
        for number, prompt in enumerate(settings.prompts or [default])
    ]


def _thinned(steps: list[int]) -> list[int]:
    """At most `_MOST_ROWS` of the steps, evenly, with the first and the last."""
    if len(steps) <= _MOST_ROWS:
        return steps
    return [steps[round(index * (len(steps) - 1) / (_MOST_ROWS - 1))] for index in range(_MOST_ROWS)]


def _opened(path: Path | None) -> Image.Image | None:
    if path is None:
        return None
    try:
        return pixels.read(path, "samples").convert("RGB")
    except RequestError:
        return None

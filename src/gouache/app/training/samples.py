"""Pictures painted while a run trains, with equal seeds at every moment, and a contact sheet that grows with them."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from gouache.app.training.sliders import concepts_of
from gouache.data.record import Record
from gouache.data.templates import fill
from gouache.errors import FileError, RequestError
from gouache.files.write import write_atomic
from gouache.generate import run
from gouache.generate.picture import read_recipe
from gouache.generate.request import Request
from gouache.images.sheet import sheet
from gouache.model.model import Model
from gouache.prompts.grammar import escape
from gouache.training.distributed import ALONE, World
from gouache.training.run_settings import RunSettings

SHEET = "sheet.png"
LAST = "-last"  # ends the names of pictures painted with the last weights, beside those of the averages
_NAME = re.compile(rf"step-(\d{{8,}})-(\d{{2,}})({LAST})?\.png")
_MOST_ROWS = 40  # of the sheet; older moments are thinned out
_COMPARED = ("prompt", "negative", "seed", "size", "steps", "sampler", "cfg", "clip_skip")


class Samples:
    """Paints `requests` with the weights that `model` has now and saves them in `folder`.

    With `strengths`, of a slider, each is painted at all of them, which `set_strength` sets.
    """

    def __init__(
        self,
        model: Model,
        requests: Sequence[Request],
        folder: Path,
        strengths: Sequence[float] = (),
        set_strength: Callable[[float], None] = lambda strength: None,
    ) -> None:
        self._model, self._folder, self._set_strength = model, folder, set_strength
        self._requests = [each for each in requests for _ in strengths or (1.0,)]
        self._strengths = [strength for _ in requests for strength in strengths]

    def paint(self, step: int, ending: str = "", world: World = ALONE) -> Path:
        """The pictures after `step` steps; returns the contact sheet. `ending` "" or `LAST`.

        Those that a run painted before it was stopped are kept. Where weights are divided among the processes of a
        `world`, all of them call this, and the main one saves. Raises GouacheError if they cannot be painted.
        """
        paths = [self._folder / f"step-{step:08d}-{number:02d}{ending}.png" for number in range(len(self._requests))]
        painted = world.of_main([_shows(*each) for each in zip(paths, self._requests)])
        for number, request in enumerate(self._requests):
            if painted[number]:
                continue
            if self._strengths:
                self._set_strength(self._strengths[number])
            picture = next(iter(run.paint(self._model, request)))
            if world.is_main:
                picture.save(paths[number])
        return self._write_sheet() if world.is_main else self._folder / SHEET

    def forget(self, after: int) -> None:
        forget(self._folder, after)

    def _write_sheet(self) -> Path:
        found: dict[int, dict[tuple[int, str], Path]] = {}
        for step, number, ending, path in pictures(self._folder):
            found.setdefault(step, {})[number, ending] = path
        steps = _thinned(sorted(found))
        endings = ("", LAST) if any(LAST in {ending for _, ending in row} for row in found.values()) else ("",)
        columns = [(number, ending) for number in range(len(self._requests)) for ending in endings]
        heads = [self._head(number) + " (last weights)" * bool(ending) for number, ending in columns]
        rows = [[_opened(found[step].get(each), self._requests[each[0]]) for each in columns] for step in steps]
        path = self._folder / SHEET
        buffer = io.BytesIO()
        sheet(heads, [f"step {step}" for step in steps], rows).save(buffer, "PNG")
        write_atomic(path, buffer.getvalue())
        return path

    def _head(self, number: int) -> str:
        strength = f" at {self._strengths[number]:g}" if self._strengths else ""
        return f"{self._requests[number].prompt}{strength}"


def forget(folder: Path, after: int) -> None:
    """Remove the pictures of later steps, which other settings will paint differently. Raises FileError."""
    for step, _, _, path in pictures(folder):
        if step > after:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise FileError(path, f"cannot be removed: {error.strerror}") from None


def pictures(folder: Path) -> Iterator[tuple[int, int, str, Path]]:
    """(step, number of the prompt, "" or `LAST`, path) of the samples in `folder`, in that order."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir()) if folder.is_dir() else ()
    yield from sorted((int(match[1]), int(match[2]), match[3] or "", path) for match, path in found if match)


def requests_of(settings: RunSettings, training: Sequence[Record], size: tuple[int, int]) -> list[Request]:
    """The samples' requests: the model's own defaults, at the size of training pictures. Raises RequestError."""
    chosen = settings.samples
    changed = {
        **({"steps": chosen.steps} if chosen.steps else {}),
        **({"sampler": chosen.sampler} if chosen.sampler else {}),
        **({"clip_skip": settings.model.clip_skip} if settings.model.clip_skip else {}),
    }
    return [
        Request(prompt=prompt, negative=chosen.negative, seed=chosen.seed + number, size=size, **changed)
        for number, prompt in enumerate(chosen.prompts or [default_prompt(settings, training)])
    ]


def default_prompt(settings: RunSettings, training: Sequence[Record]) -> str:
    """The first caption, or template of one, which has the trigger word: what the run learns to paint.

    It is a prompt that means just this text, as captions do.
    """
    if settings.mode == "slider":
        return escape(concepts_of(settings)[0].target or "a picture")
    subject = [record for record in training if not record.regularization]
    captions = (line for record in subject for line in record.captions if line.strip())
    words = " ".join(filter(None, (settings.data.trigger, settings.data.class_word)))
    templates = next((record.caption_options.templates for record in subject), ())
    caption = fill(templates[0], next(captions, "")) if templates else next(captions, "") or words or "a picture"
    return escape(" ".join(filter(None, (settings.data.prefix, caption, settings.data.suffix))))


def most_common(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size of most training pictures; of equally many the largest."""
    counted = Counter(sizes)
    return max(counted, key=lambda size: (counted[size], size[0] * size[1], size))


def _thinned(steps: list[int]) -> list[int]:
    """At most `_MOST_ROWS` of the steps, evenly, with the first and the last."""
    if len(steps) <= _MOST_ROWS:
        return steps
    return [steps[round(index * (len(steps) - 1) / (_MOST_ROWS - 1))] for index in range(_MOST_ROWS)]


def _shows(path: Path, request: Request) -> bool:
    """Whether `path` is a picture of `request`."""
    try:
        painted = read_recipe(path)[0]["request"] if path.is_file() else {}
    except RequestError:
        return False
    wanted = request.to_json()
    return bool(painted) and all(painted.get(name) == wanted[name] for name in _COMPARED if wanted[name] is not None)


def _opened(path: Path | None, request: Request) -> Image.Image | None:
    """The picture, if it is one of the same prompt and seed."""
    if path is None:
        return None
    try:
        recipe, picture = read_recipe(path)
    except RequestError:
        return None
    painted = recipe["request"]
    return picture if (painted.get("prompt"), painted.get("seed")) == (request.prompt, request.seed) else None

"""The same prompts and seeds with several models, side by side, with what each cost: to choose by looking.

OUT/sheet.png         a column a model, a row a prompt and seed
OUT/measures.json     per model: seconds, memory, fit to the prompts, distance to the first model's pictures
OUT/1-MODEL/...png    every picture, with its recipe
"""

from __future__ import annotations

import gc
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from gouache.errors import FileError, RequestError, printable
from gouache.files.record import ModelFile
from gouache.files.write import write_atomic
from gouache.generate.picture import Picture
from gouache.generate.request import Request
from gouache.images.sheet import sheet
from gouache.model import clip

MOST_PROMPTS = 1000


class Painter(Protocol):
    """What is asked of a loaded model: `gouache.Model` is one."""

    file: ModelFile

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def sha256(self) -> str: ...
    def paint(self, prompt: Request, /) -> Iterator[Picture]: ...


OnPicture = Callable[[str, int, int], None]
"""Told before each picture: of which model, how many are done, how many there will be."""


@dataclass(frozen=True)
class Measured:
    """A model's column.

    `load_seconds` and `picture_seconds` (the mean) are wall time; `memory` the most bytes held while painting: the
    device's, or on a CPU the process's own beyond what it held before. `fit` is the mean CLIP score of pictures and
    prompts, 100 times the cosine. `distance` is the mean over the pictures of how far grey levels differ from the
    first model's (root mean square, of 255), `likeness` 100 times the cosine of CLIP's view of both. None where there
    is no CLIP, or for the first model.
    """

    model: str
    path: str
    sha256: str
    load_seconds: float
    picture_seconds: float
    memory: int
    fit: float | None
    distance: float | None
    likeness: float | None

    def words(self) -> list[str]:
        """The measures one by one."""
        said = [f"{self.picture_seconds:.2f} s a picture", f"{self.memory / 1e9:.2f} GB"]
        for value, text in (
            (self.fit, "CLIP score {:.1f}"), (self.distance, "{:.1f} levels from the first"),
            (self.likeness, "CLIP likeness {:.1f}"),
        ):  # fmt: skip
            if value is not None:
                said.append(text.format(value))
        return said


def prompts_of(path: Path) -> list[str]:
    """A prompt a line; empty lines and those that begin with # are passed over. Raises FileError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(path, f"cannot be read as text: {error}") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not 0 < len(prompts) <= MOST_PROMPTS:
        raise FileError(path, f"holds {len(prompts)} prompts; expected 1 to {MOST_PROMPTS}, one a line")
    return prompts


def compare(
    models: Sequence[str],
    prompts: Sequence[str],
    out: Path,
    load: Callable[[str], Painter],
    *,
    encoder: Path | None = None,
    on_picture: OnPicture | None = None,
    **knobs: Any,
) -> list[Measured]:
    """Paint, measure, and write `out`, which must not exist. `load` opens a model; one is in memory at a time.

    `knobs` are fields of Request for all; `count` pictures a prompt have seeds from `seed` (0 if none) on. `encoder` is
    a whole CLIP. Raises GouacheError; what was painted until then stays in `out`.
    """
    if len(set(models)) < 2:
        raise RequestError("models", "there is nothing to compare; name two models or more, each once")
    if out.exists():
        raise RequestError("output", f"{out} exists already; give another folder")
    request = Request.from_json({**knobs, "prompt": prompts[0], "seed": knobs.get("seed") or 0}).settled()
    judge = clip.load(encoder) if encoder is not None else None
    total, done = len(models) * len(prompts) * request.count, 0
    columns, measured, size = list[list[Image.Image]](), list[Measured](), None
    for number, name in enumerate(models, 1):
        before = _held(None)
        began = time.perf_counter()
        model = load(name)
        loaded = time.perf_counter() - began
        size = size or request.size or model.size  # the first model's, so that the pictures can be laid side by side
        folder = out / f"{number}-{_folder(name)}"
        pictures, seconds, memory = list[Picture](), list[float](), 0
        for prompt in prompts:
            began = time.perf_counter()
            for picture in model.paint(replace(request, prompt=prompt, size=size)):
                seconds.append(time.perf_counter() - began)
                memory = max(memory, _held(model.device) - (before if model.device.type == "cpu" else 0))
                picture.save(folder / f"{len(pictures):05d}-{picture.seed}.png")
                pictures.append(picture)
                done += 1
                if on_picture is not None:
                    on_picture(name, done, total)
                began = time.perf_counter()
        columns.append([picture.image for picture in pictures])
        measured.append(
            Measured(
                printable(name), printable(str(model.file.path)), model.sha256, loaded, float(np.mean(seconds)), memory,
                *_judged(judge, [each for each in prompts for _ in range(request.count)], columns[-1], columns[0]),
            )
        )  # fmt: skip
        del model, pictures
        gc.collect()
        _write(out, measured, prompts, request, columns)
    return measured


def _judged(
    judge: clip.Clip | None, prompts: list[str], mine: list[Image.Image], first: list[Image.Image]
) -> tuple[float | None, float | None, float | None]:
    """(fit, distance, likeness)"""
    distance = None if mine is first else float(np.mean([_distance(a, b) for a, b in zip(mine, first)]))
    if judge is None:
        return None, distance, None
    seen = judge.pictures(mine)
    fit = 100 * float((seen * judge.prompts(prompts)).sum(1).mean())
    likeness = None if mine is first else 100 * float((seen * judge.pictures(first)).sum(1).mean())
    return fit, distance, likeness


def _distance(a: Image.Image, b: Image.Image) -> float:
    pixels = (np.asarray(each.convert("RGB"), np.float64) for each in (a, b.resize(a.size)))
    return float(np.sqrt(np.mean(np.square(next(pixels) - next(pixels)))))


def _held(device: torch.device | None) -> int:
    """Bytes held: the most so far on a CUDA device; else this process's own, where the system tells."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 0


def _folder(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", Path(name).stem or name)[:80]


def _write(
    out: Path, measured: list[Measured], prompts: Sequence[str], request: Request, columns: list[list[Image.Image]]
) -> None:
    """The sheet and the measures of what there is so far."""
    rows = [f"{prompt}\nseed {(request.seed or 0) + number}" for prompt in prompts for number in range(request.count)]
    pictures = [[column[row] for column in columns] for row in range(len(rows))]
    draft = out / ".sheet.png"
    sheet(["\n".join([Path(each.model).stem, *each.words()]) for each in measured], rows, pictures).save(draft, "PNG")
    draft.replace(out / "sheet.png")
    told = {"prompts": list(prompts), "request": request.to_json(), "models": [asdict(each) for each in measured]}
    write_atomic(out / "measures.json", json.dumps(told, indent=1, ensure_ascii=False, default=str).encode())

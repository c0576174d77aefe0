"""Paints the same prompts and seeds with several models, on one sheet, and measures what each costs.

OUT/sheet.png         one column per model, one row per prompt and seed
OUT/measures.json     per model: seconds, memory, CLIP score, difference from the first model's pictures
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
from gouache.outside import read_text, reason

MAX_PROMPTS = 1000
MAX_LENGTH = 20_000  # characters of a prompt
MAX_FILE = 4_000_000  # bytes of the file


class Painter(Protocol):
    """What `compare` needs of a loaded model: `gouache.Model` has it."""

    file: ModelFile

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def sha256(self) -> str: ...
    def paint(self, prompt: Request, /) -> Iterator[Picture]: ...


OnPicture = Callable[[str, int, int], None]
"""Called after each picture with: the model's name, the number of pictures done, the number in all."""


@dataclass(frozen=True)
class Measures:
    """The measures of one model.

    `load_seconds` and `picture_seconds` (mean) are wall time. `memory` is the peak in bytes while painting: on a GPU
    its allocated memory, on a CPU the anonymous memory of this process beyond that before loading. `fit` is the mean
    CLIP score of pictures and prompts, 100 times the cosine. `distance` is the mean over the pictures of the root mean
    square difference from the first model's, in levels of 0 to 255; `likeness` is 100 times the cosine of the CLIP
    embeddings of both. None without a CLIP, or for the first model.
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

    def texts(self) -> list[str]:
        """One text per measure."""
        texts = [f"{self.picture_seconds:.2f} s per picture", f"{self.memory / 1e9:.2f} GB"]
        for value, text in (
            (self.fit, "CLIP score {:.1f}"), (self.distance, "{:.1f} levels from the first"),
            (self.likeness, "CLIP likeness {:.1f}"),
        ):  # fmt: skip
            if value is not None:
                texts.append(text.format(value))
        return texts


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one per line. Empty lines and lines that begin with # are skipped.

    Raises FileError.
    """
    try:
        lines = read_text(path, MAX_FILE).splitlines()
    except FileError as error:
        raise FileError(path, f"{reason(error)}; expected a text file with one prompt per line") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not 0 < len(prompts) <= MAX_PROMPTS:
        raise FileError(path, f"contains {len(prompts)} prompts; expected 1 to {MAX_PROMPTS}, one per line")
    if (longest := max(map(len, prompts))) > MAX_LENGTH:
        raise FileError(path, f"has a prompt of {longest:,} characters, expected at most {MAX_LENGTH:,}")
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
) -> list[Measures]:
    """Paint, measure, and write the folder `out`, which must not exist. `load` loads a model; one is loaded at a time.

    `knobs` are fields of Request for all pictures; `count` pictures per prompt have seeds from `seed` (default 0) on.
    `encoder` is a complete CLIP. Raises GouacheError; the pictures painted until then stay in `out`.
    """
    if len(set(models)) < 2:
        raise RequestError("models", "nothing to compare; give two or more different models")
    request = Request.from_json({**knobs, "prompt": prompts[0], "seed": knobs.get("seed") or 0}).settled()
    scorer = clip.load(encoder) if encoder is not None else None
    _claim(out)
    total, done = len(models) * len(prompts) * request.count, 0
    columns, measures, size = list[list[Image.Image]](), list[Measures](), None
    for number, name in enumerate(models, 1):
        before = _memory_in_use(None)
        began = time.perf_counter()
        model = load(name)
        load_seconds = time.perf_counter() - began
        size = size or request.size or model.size  # the first model's for all, so that the rows of the sheet fit
        folder = out / f"{number}-{_folder_name(name)}"
        pictures, seconds, memory = list[Picture](), list[float](), 0
        for prompt in prompts:
            began = time.perf_counter()
            for picture in model.paint(replace(request, prompt=prompt, size=size)):
                seconds.append(time.perf_counter() - began)
                memory = max(memory, _memory_in_use(model.device) - (before if model.device.type == "cpu" else 0))
                picture.save(folder / f"{len(pictures):05d}-{picture.seed}.png")
                pictures.append(picture)
                done += 1
                if on_picture is not None:
                    on_picture(name, done, total)
                began = time.perf_counter()
        columns.append([picture.image for picture in pictures])
        scores = _scores(scorer, [each for each in prompts for _ in range(request.count)], columns[-1], columns[0])
        measures.append(
            Measures(
                printable(name), printable(str(model.file.path)), model.sha256, load_seconds, float(np.mean(seconds)),
                memory, *scores,
            )
        )  # fmt: skip
        del model, pictures
        gc.collect()
        _write(out, measures, prompts, request, columns)
    return measures


def _claim(out: Path) -> None:
    """Create the folder before the first picture is painted, so that no other process uses it too."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.mkdir()
    except FileExistsError:
        raise RequestError("output", f"{printable(str(out))} exists already; give another folder") from None
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise RequestError("output", f"{printable(str(out))} cannot be created: {cause}") from None


def _scores(
    scorer: clip.Clip | None, prompts: list[str], images: list[Image.Image], first: list[Image.Image]
) -> tuple[float | None, float | None, float | None]:
    """(fit, distance, likeness)"""
    distance = None if images is first else float(np.mean([_distance(a, b) for a, b in zip(images, first)]))
    if scorer is None:
        return None, distance, None
    embeddings = scorer.encode_images(images)
    fit = 100 * float((embeddings * scorer.encode_prompts(prompts)).sum(1).mean())
    likeness = None if images is first else 100 * float((embeddings * scorer.encode_images(first)).sum(1).mean())
    return fit, distance, likeness


def _distance(a: Image.Image, b: Image.Image) -> float:
    pixels = (np.asarray(each.convert("RGB"), np.float64) for each in (a, b.resize(a.size)))
    return float(np.sqrt(np.mean(np.square(next(pixels) - next(pixels)))))


def _memory_in_use(device: torch.device | None) -> int:
    """Bytes: the peak on a CUDA device; else the anonymous memory of this process, 0 on systems without /proc."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in read_text("/proc/self/status").splitlines():
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
    except (FileError, OSError):
        pass
    return 0


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", Path(name).stem or name)[:80]


def _write(
    out: Path, measures: list[Measures], prompts: Sequence[str], request: Request, columns: list[list[Image.Image]]
) -> None:
    """Write the sheet and the measures of the models painted so far."""
    rows = [f"{prompt}\nseed {(request.seed or 0) + number}" for prompt in prompts for number in range(request.count)]
    pictures = [[column[row] for column in columns] for row in range(len(rows))]
    draft = out / ".sheet.png"
    sheet(["\n".join([Path(each.model).stem, *each.texts()]) for each in measures], rows, pictures).save(draft, "PNG")
    draft.replace(out / "sheet.png")
    report = {"prompts": list(prompts), "request": request.to_json(), "models": [asdict(each) for each in measures]}
    write_atomic(out / "measures.json", json.dumps(report, indent=1, default=str).encode())

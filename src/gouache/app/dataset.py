"""`gouache dataset`: a data set checked, and shown as a sheet of pictures with their captions."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from gouache.app import names
from gouache.app.settings import Settings
from gouache.app.training.pictures import index_cache, settings_of, sides
from gouache.data import check as checks
from gouache.data import folders, scores
from gouache.data.buckets import Buckets, Size
from gouache.data.contents import SETTING, OnWork, in_threads
from gouache.data.dataset import DataSet
from gouache.data.members import read_bytes
from gouache.data.record import Record
from gouache.data.subset import Subset
from gouache.errors import RequestError, printable
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.write import write_atomic, write_new
from gouache.images import pixels
from gouache.images.sheet import labelled_tiles
from gouache.prompts.tokenizer import Tokenizer

TILE = 192  # pixels
_ACROSS = 6
_LABEL = 240  # characters
_SIDE = 512  # pixels, the resolution where neither the data set nor a model has one
_MAX_TILES = 2000  # a sheet of these is 1200 by 90,000 pixels


@dataclass(frozen=True)
class Source:
    """Which pictures: see `data.folders.read` and `data.scores.select`."""

    path: Path
    trigger: str = ""
    class_word: str = ""
    regularization: Path | None = None
    caption_column: str = ""
    conditions: Sequence[str] = field(default_factory=tuple)

    def read(self, settings: Settings, stream: bool = False, on_work: OnWork | None = None) -> DataSet:
        """`stream` and `on_work` are those of `data.shards.read`. Raises GouacheError."""
        found = folders.read(
            self.path,
            Subset(self.trigger, self.class_word),
            regularization=self.regularization,
            caption_column=self.caption_column,
            stream=stream,
            cache=index_cache(settings),
            on_work=on_work,
        )
        return scores.select(found, self.conditions) if self.conditions else found


@dataclass(frozen=True)
class Training:
    """How the pictures shall be trained on. What is not given is as the data set says, else as the model is."""

    model: str = ""
    resolution: Size | None = None
    step: int | None = None
    upscale: bool | None = None
    batch: int | None = None

    def buckets(self, own: Mapping[str, Mapping[str, Any]], settings: Settings) -> Buckets:
        """`own` are the settings of the data set (`training.pictures.settings_of`). Raises GouacheError."""
        data = own.get("data", {})
        usual = _SIDE, _SIDE
        if self.model:
            found = identify(open_model(names.resolve(self.model, settings)))
            usual = found.size.value if found.size is not None else usual
        resolution = self.resolution or sides(data.get("resolution", []), usual)[0]
        step = self.step or data.get("bucket_step") or (64 if min(resolution) >= _SIDE else 8)
        upscale = data.get("upscale", True) if self.upscale is None else self.upscale
        low, high = data.get("bucket_min") or None, data.get("bucket_max") or None
        return Buckets(resolution, step, low, high, upscale, fixed=not data.get("buckets", True))


def cache_of(path: Path, settings: Settings) -> Path:
    """The cache of the data set at `path`, see `data.contents`."""
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:24]
    return settings.cache / "datasets" / f"{name}.jsonl"


def check(
    source: Source,
    training: Training,
    settings: Settings,
    *,
    max_tokens: int = checks.MAX_TOKENS,
    held_out: Path | None = None,
    on_work: OnWork | None = None,
) -> checks.Report:
    """What is wrong with a data set, see `data.check`. `held_out` is a data set for validation. Raises GouacheError."""
    dataset = source.read(settings, on_work=on_work)
    own = settings_of(dataset)
    return checks.check(
        dataset if training.resolution is None else _at_one_resolution(dataset),
        training.buckets(own, settings),
        batch=training.batch or own.get("train", {}).get("batch") or 1,
        tokenizer=Tokenizer(),
        max_tokens=max_tokens,
        held_out=Source(held_out).read(settings) if held_out is not None else None,
        cache=cache_of(source.path, settings),
        on_work=on_work,
    )


def _at_one_resolution(dataset: DataSet) -> DataSet:
    return replace(dataset, records=[replace(record, resolution=None) for record in dataset.records])


def show(dataset: DataSet, output: Path, *, count: int = 60, overwrite: bool = False) -> int:
    """Writes a PNG sheet of `count` pictures, evenly chosen from all, with their captions; returns how many they are.

    Raises RequestError if the file cannot be written, or exists without `overwrite`.
    """
    if output.suffix.lower() != ".png":
        raise RequestError("output", f"{printable(str(output))} does not end in .png")
    if not overwrite and os.path.lexists(output):
        raise RequestError("output", f"{printable(str(output))} exists; add --overwrite to replace it")
    if not 0 < count <= _MAX_TILES:
        raise RequestError("count", f"is {count}; expected 1 to {_MAX_TILES}")
    total = len(dataset.records)
    count = min(count, total)
    chosen = [dataset.records[place * total // count] for place in range(count)]
    tiles, labels = list[Image.Image](), list[str]()
    for record, tile in zip(chosen, in_threads(_tile, chosen)):
        readable = isinstance(tile, Image.Image)
        tiles.append(tile if readable else Image.new("RGB", (TILE, TILE), "salmon"))
        labels.append(_label(record) if readable else f"{_label(record)}\n(cannot be read)")
    buffer = io.BytesIO()
    labelled_tiles(tiles, labels, across=_ACROSS).save(buffer, "PNG")
    try:
        (write_atomic if overwrite else write_new)(output, buffer.getvalue())
    except FileExistsError:
        raise RequestError("output", f"{printable(str(output))} exists; add --overwrite to replace it") from None
    return count


def _tile(record: Record) -> Image.Image:
    data = read_bytes(record.path, SETTING)
    picture = pixels.on_white(pixels.decode(data, str(record.path), SETTING))
    picture.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    return picture


def _label(record: Record) -> str:
    about = [f"{record.repeats}x"] * (record.repeats != 1) + ["class"] * record.regularization
    about += ["mask"] * (record.mask is not None)
    name = printable(record.name, 80) + (f" ({', '.join(about)})" if about else "")
    return f"{name}\n{printable(record.captions[0], _LABEL) or '(no caption)'}"


def to_json(record: Record) -> dict[str, Any]:
    """What `gouache dataset show --json` prints of a picture."""
    return {
        "name": record.name,
        "path": str(record.path),
        "captions": list(record.captions),
        "repeats": record.repeats,
        "regularization": record.regularization,
        "mask": str(record.mask) if record.mask else None,
        "scores": dict(record.scores),
    }

"""Checks a data set before it is trained on: what cannot be read, what is there twice, and what training would lose."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageStat

from gouache.data import captions, masks
from gouache.data.buckets import Buckets, Crop
from gouache.data.contents import SETTING, Content, OnWork, contents, in_threads
from gouache.data.dataset import DataSet
from gouache.data.duplicates import equal_files, groups
from gouache.data.epochs import balance
from gouache.data.members import File, read_bytes
from gouache.data.record import Record
from gouache.data.shards import LARGE
from gouache.errors import RequestError, printable
from gouache.images import pixels
from gouache.prompts.tokenizer import Tokenizer
from gouache.wording import plural

MAX_TOKENS = 75  # of a caption, without begin and end
_ENLARGED = 1.25  # factor above which a picture is called small
_LOST = 0.2  # share above which what is cut off is reported
_SHOWN = 80  # characters of a caption


@dataclass(frozen=True)
class Finding:
    """`kind` is one of a few words, `message` a line, `pictures` the names it concerns.

    `fault`: training would fail, or learn something that was not intended; otherwise a remark.
    """

    kind: str
    message: str
    pictures: Sequence[str] = ()
    fault: bool = False


@dataclass(frozen=True)
class Bucket:
    """A size (width, height) that pictures are trained at.

    `pictures` have it, `seen` per epoch in `batches`; `lost` is the share of a picture that is cut off, on average.
    """

    size: tuple[int, int]
    pictures: int
    seen: int
    batches: int
    lost: float


@dataclass(frozen=True)
class Report:
    """`seen` is the number of pictures per epoch, with repeats, of them `regularization` for the class.

    `batches` is the number of batches of at most `batch` pictures.
    """

    pictures: int
    seen: int
    regularization: int
    batch: int
    batches: int
    buckets: Sequence[Bucket]
    findings: Sequence[Finding]
    notes: Sequence[str]

    @property
    def faults(self) -> list[Finding]:
        return [each for each in self.findings if each.fault]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Picture:
    """A picture that can be read."""

    record: Record
    content: Content
    crop: Crop


def check(
    dataset: DataSet,
    buckets: Buckets,
    *,
    batch: int = 1,
    tokenizer: Tokenizer | None = None,
    max_tokens: int = MAX_TOKENS,
    held_out: DataSet | None = None,
    cache: Path | None = None,
    on_work: OnWork | None = None,
) -> Report:
    """Everything that can be known of `dataset` before training, with all pictures decoded.

    `buckets` are the sizes of the run, `batch` its batch size. `tokenizer` counts the tokens of captions, of which
    programs without chunks use `max_tokens`. `held_out`: pictures for validation, which should not be in `dataset`.
    `cache`: see `contents`.
    """
    records = _balanced(dataset.records)
    read = contents([record.path for record in records], cache, on_work)
    pictures = [
        _Picture(record, found, _buckets_of(record, buckets).crop(found.size))
        for record, found in zip(records, read)
        if isinstance(found, Content)
    ]
    findings = [*_unreadable(records, read), *_duplicates(pictures)]
    if held_out is not None:
        findings += _leaks(pictures, held_out, cache, on_work)
    findings += [*_sizes(pictures, buckets), *_captions(records, tokenizer, max_tokens), *_masks(records)]
    table = _table(pictures, batch)
    return Report(
        pictures=len(records),
        seen=sum(each.record.repeats for each in pictures),
        regularization=sum(each.record.repeats for each in pictures if each.record.regularization),
        batch=batch,
        batches=sum(bucket.batches for bucket in table),
        buckets=table,
        findings=findings,
        notes=list(dataset.notes),
    )


def _balanced(records: Sequence[Record]) -> list[Record]:
    """With the repeats that a run gives them."""
    repeats = balance([each.repeats for each in records], [each.regularization for each in records])
    return [replace(record, repeats=count) for record, count in zip(records, repeats)]


def _buckets_of(record: Record, buckets: Buckets) -> Buckets:
    return replace(buckets, resolution=record.resolution) if record.resolution else buckets


def _unreadable(records: Sequence[Record], read: Sequence[Content | RequestError]) -> Iterator[Finding]:
    for record, found in zip(records, read):
        if isinstance(found, RequestError):
            message = str(found).removeprefix(f"{SETTING}: ")
            yield Finding("unreadable", message, [record.name], fault=True)


def _duplicates(pictures: Sequence[_Picture]) -> Iterator[Finding]:
    """A picture that is listed several times, with other captions or at other sizes, is no copy of itself."""
    unique = list({each.record.path: each for each in pictures}.values())
    found = [each.content for each in unique]
    equal = equal_files(found)
    for rows in equal:
        yield Finding("duplicate", "the same file several times", _names(unique, rows), fault=True)
    if len(found) > LARGE:
        yield Finding("near duplicate", f"not searched for among more than {LARGE:,} pictures")
    for rows in groups(found) if len(found) <= LARGE else ():
        if len(rows) > 1 and rows not in equal:
            yield Finding("near duplicate", "look alike, maybe mirrored or in another size", _names(unique, rows))


def _leaks(
    pictures: Sequence[_Picture], held_out: DataSet, cache: Path | None, on_work: OnWork | None
) -> Iterator[Finding]:
    read = contents([record.path for record in held_out.records], cache, on_work)
    yield from _unreadable(held_out.records, read)
    held = [(record, found) for record, found in zip(held_out.records, read) if isinstance(found, Content)]
    together = [(each.record, each.content) for each in pictures] + held
    for rows in groups([found for _, found in together]):
        if rows[0] < len(pictures) <= rows[-1]:
            names = [together[row][0].name for row in rows]
            yield Finding("leak", "to be trained on and also held out, or copies of each other", names, fault=True)


def _sizes(pictures: Sequence[_Picture], buckets: Buckets) -> Iterator[Finding]:
    factors = {
        each.record.name: math.sqrt(_buckets_of(each.record, buckets).area / math.prod(each.content.size))
        for each in pictures
    }
    if small := {name: factor for name, factor in factors.items() if factor > _ENLARGED}:
        most = f"{max(small.values()):.1f}"
        message = f"{plural(len(small), 'picture')} smaller than the resolution, by a factor of up to {most}"
        yield Finding("small", message, list(small))
    if lossy := {each.record.name: each.crop.lost for each in pictures if each.crop.lost > _LOST}:
        most = f"{max(lossy.values()):.0%}"
        yield Finding(
            "crop", f"{plural(len(lossy), 'picture loses', 'pictures lose')} up to {most} of the area", list(lossy)
        )


def _captions(records: Sequence[Record], tokenizer: Tokenizer | None, max_tokens: int) -> Iterator[Finding]:
    if empty := [record.name for record in records if not any(captions.longest(record))]:
        yield Finding("caption", f"{plural(len(empty), 'picture')} with an empty caption", empty)
    if tokenizer is None:
        return
    cut = dict[str, str]()
    counts = dict[str, int]()
    for record in records:
        for text in captions.longest(record):
            words = tokenizer.words(text)
            count = sum(len(ids) for _, ids in words)
            if count > max(max_tokens, counts.get(record.name, 0)):
                cut[record.name], counts[record.name] = _behind(words, max_tokens), count
    if cut:
        most = max(counts, key=lambda name: counts[name])
        chunks = math.ceil(counts[most] / MAX_TOKENS)
        message = (
            f"{plural(len(cut), 'caption')} longer than {max_tokens} tokens; the longest has {counts[most]}: training "
            f"uses all of it, in {plural(chunks, 'chunk')} of {MAX_TOKENS}, where other programs cut off "
            f'"{printable(cut[most], _SHOWN)}"'
        )
        yield Finding("long caption", message, list(cut))


def _behind(words: Sequence[tuple[str, tuple[int, ...]]], limit: int) -> str:
    """The words that are not completely within the first `limit` tokens."""
    count, lost = 0, list[str]()
    for word, ids in words:
        count += len(ids)
        if count > limit:
            lost.append(word)
    return " ".join(lost)


def _masks(records: Sequence[Record]) -> Iterator[Finding]:
    """Masks are decoded: how much of each picture counts."""
    masked = [each for each in records if each.mask is not None or each.picture_options.alpha_mask]
    shares = dict[str, float]()
    for record, share in zip(masked, in_threads(_mask_share, masked)):
        if isinstance(share, RequestError):
            yield Finding("mask", printable(str(share), 1000), [record.name], fault=True)
        elif share is not None:
            shares[record.name] = share
    if not masked:
        return
    if black := [name for name, share in shares.items() if share == 0]:
        message = f"{plural(len(black), 'mask is', 'masks are')} black everywhere: nothing would be learnt"
        yield Finding("mask", message, black, fault=True)
    mean = sum(shares.values()) / len(shares) if shares else 1
    count = f"{len(shares)} of {plural(len(records), 'picture')}"
    yield Finding("mask", f"{count} with a mask; {mean:.0%} of their area counts on average", list(shares))


def _mask_share(record: Record) -> float | None:
    """The share of the picture that counts; None if it has no mask, or cannot be read."""
    try:
        picture = _decoded(record.path, SETTING)
    except RequestError:  # a finding of its own
        return None
    file = _decoded(record.mask, "mask") if record.mask is not None else None
    mask = masks.mask_of(picture, record.picture_options.alpha_mask, file, record.name)
    return ImageStat.Stat(mask).mean[0] / 255 if mask is not None else None


def _decoded(path: File, setting: str) -> Image.Image:
    return pixels.decode(read_bytes(path, setting), str(path), setting)


def _table(pictures: Sequence[_Picture], batch: int) -> list[Bucket]:
    by_size = dict[tuple[int, int], list[_Picture]]()
    for each in pictures:
        by_size.setdefault(each.crop.size, []).append(each)
    table = list[Bucket]()
    for size, inside in sorted(by_size.items()):
        seen = sum(each.record.repeats for each in inside)
        lost = sum(each.crop.lost for each in inside) / len(inside)
        table.append(Bucket(size, len(inside), seen, math.ceil(seen / batch), lost))
    return table


def _names(pictures: Sequence[_Picture], rows: Sequence[int]) -> list[str]:
    return [pictures[row].record.name for row in rows]

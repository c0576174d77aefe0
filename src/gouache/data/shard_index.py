"""The index of a tar shard: where its pictures are, how large, with which captions and scores.

It is made once from the tar headers; captions, JSON and the headers of the pictures are read, no picture is decoded. It
is stored as a file that is mapped into memory, so that an index of millions of samples costs hardly any.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from gouache.data.listing import MAX_CAPTION, PICTURES, caption_lines
from gouache.data.members import Member, sampled_digest, sampled_ends
from gouache.data.metadata import CAPTION_COLUMNS, captions_of, score_of
from gouache.data.tar_headers import DamagedTar, Entry, entries
from gouache.errors import FileError, RequestError
from gouache.files.write import write_atomic
from gouache.images import pixels
from gouache.outside import MalformedText, open_outside, parse_json, reason

FORMAT = 1
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")  # webdataset: a sample's key ends at the first dot of the name
_SETTING = "data"
_MAX_SAMPLES = 10_000_000  # of a shard
_MAX_MEMBERS = 64  # of a sample
_MAX_JSON = 1_000_000  # bytes
_MAX_SCORES = 64
_SHOWN = 3
_ROW = np.dtype(
    [
        ("offset", "<u8"), ("length", "<u8"), ("mask_offset", "<u8"), ("mask_length", "<u8"),
        ("text", "<u8"), ("width", "<u4"), ("height", "<u4"), ("digest", "u1", 16),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A picture of a shard. `captions` None: it has none. `mask` is a member too; only its bytes are known."""

    picture: Member
    captions: tuple[str, ...] | None
    mask: Member | None
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Faults:
    """What of a shard is not used: `bad` samples, of which `shown` has the first ("NAME reason"); `unpictured` samples
    without a picture; `irregular` links and devices. `damage`: why it is not read to its end; "" if it is."""

    bad: int = 0
    shown: Sequence[str] = ()
    unpictured: int = 0
    irregular: int = 0
    damage: str = ""


class ShardIndex:
    """The samples of the shard `path`, by their row. `digest` identifies their pictures, captions and scores.

    `data` is a complete index, in memory or mapped. Raises ValueError if it is damaged.
    """

    def __init__(self, path: Path, data: bytes | mmap.mmap) -> None:
        self.path = path
        end = data.find(b"\n")
        header = parse_json(data[:end])
        count, columns, texts = header["count"], header["scores"], header["texts"]
        view = memoryview(data)[end + 1 :]
        self._table = np.frombuffer(view, _ROW, count)
        self._scores = np.frombuffer(view, "<f8", count * len(columns), count * _ROW.itemsize).reshape(
            count, len(columns)
        )
        self._texts = view[count * (_ROW.itemsize + 8 * len(columns)) :]
        if len(self._texts) != texts or _digest(view) != header["digest"]:
            raise ValueError("is damaged")
        self.digest, self.columns, self.json_columns = str(header["digest"]), tuple(columns), header["columns"]
        self.faults = Faults(**header["faults"])

    def __len__(self) -> int:
        return len(self._table)

    def sample(self, row: int) -> Sample:
        table = self._table[row]
        first, end = int(table["text"]), int(self._table[row + 1]["text"]) if row + 1 < len(self) else len(self._texts)
        name, captions, mask = json.loads(bytes(self._texts[first:end]))
        size = int(table["width"]), int(table["height"])
        digest = bytes(table["digest"]).hex()
        picture = Member(self.path, name, int(table["offset"]), int(table["length"]), size, digest)
        second = Member(self.path, mask, int(table["mask_offset"]), int(table["mask_length"])) if mask else None
        values = zip(self.columns, self._scores[row].tolist())
        scores = {column: value for column, value in values if value == value}  # without NaN
        return Sample(picture, None if captions is None else tuple(captions), second, scores)

    def sizes(self) -> np.ndarray:
        """(N, 2): width and height of each picture."""
        return np.stack([self._table["width"], self._table["height"]], 1)

    def digests(self) -> np.ndarray:
        """(N, 16): the digest of each picture, in bytes."""
        return self._table["digest"]

    def scores(self, column: str) -> np.ndarray:
        """(N,): a score of each sample, NaN where there is none."""
        if column not in self.columns:
            return np.full(len(self), np.nan)
        return self._scores[:, self.columns.index(column)]


def index(path: Path, suffixes: Sequence[str], caption_column: str, cache: Path | None) -> ShardIndex:
    """The index of the shard at `path`, from the folder `cache` if the shard was not changed since.

    Captions are those of the first of `suffixes` (".txt") that a sample has, else of its JSON; with a `caption_column`
    of that first. Raises FileError if the file cannot be read.
    """
    with open_outside(path) as file:
        status = os.fstat(file.fileno())
        key = json.dumps(
            [FORMAT, str(path.absolute()), status.st_size, status.st_mtime_ns, [*suffixes], caption_column]
        )
        stored = None if cache is None else cache / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.index"
        if stored is not None and (found := _stored(path, stored)) is not None:
            return found
        data = _Builder(path, file, suffixes, caption_column).build(status.st_size)
    if stored is not None:
        with suppress(OSError, FileError):  # it only costs time
            stored.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(stored, data)
            return _stored(path, stored) or ShardIndex(path, data)
    return ShardIndex(path, data)


def _stored(path: Path, stored: Path) -> ShardIndex | None:
    """None if there is no index in the file, or it is damaged."""
    try:
        with open_outside(stored) as file:
            return ShardIndex(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (FileError, OSError, ValueError, TypeError, KeyError):
        return None


class _BadSample(Exception):
    """The sample cannot be used; the message says why."""


@dataclass
class _Builder:
    path: Path
    file: BinaryIO
    suffixes: Sequence[str]
    caption_column: str
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    texts: io.BytesIO = field(default_factory=io.BytesIO)
    scores: dict[str, dict[int, float]] = field(default_factory=dict)
    columns: dict[str, None] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("bad", "unpictured", "irregular"), 0))

    def build(self, size: int) -> bytes:
        damage = ""
        try:
            for key, members in self._samples(size):
                try:
                    self._add(members)
                except _BadSample as error:
                    self.counts["bad"] += 1
                    self.shown += [f"{key}: {error}"] if len(self.shown) < _SHOWN else []
        except DamagedTar as error:
            damage = str(error)
        values = np.full((len(self.rows), len(self.scores)), np.nan, "<f8")
        for place, of_column in enumerate(self.scores.values()):
            values[list(of_column), place] = list(of_column.values())
        body = np.array(self.rows, _ROW).tobytes() + values.tobytes() + self.texts.getvalue()
        header = {
            "count": len(self.rows), "scores": list(self.scores), "texts": self.texts.tell(),
            "columns": list(self.columns)[:_MAX_SCORES], "digest": _digest(body),
            "faults": {**self.counts, "shown": self.shown, "damage": damage},
        }  # fmt: skip
        line = json.dumps(header).encode()
        return line + b" " * (-(len(line) + 1) % 8) + b"\n" + body  # numbers are aligned

    def _samples(self, size: int) -> Iterator[tuple[str, dict[str, Entry]]]:
        """(key, members by the rest of their names) of each sample: consecutive files that share the key."""
        key, members = "", dict[str, Entry]()
        try:
            for entry in entries(self.file, size):
                if not entry.regular:
                    self.counts["irregular"] += not entry.name.endswith("/")
                    continue
                match = _NAME.fullmatch(entry.name.removeprefix("./"))
                if match is None or match[1].rpartition("/")[2].startswith("__"):  # webdataset's own files
                    continue
                if match[1] != key:
                    yield from self._complete(key, members)
                    key, members = match[1], {}
                if len(members) < _MAX_MEMBERS:
                    members.setdefault(match[2].lower(), entry)
        except DamagedTar:
            yield from self._complete(key, members)
            raise
        yield from self._complete(key, members)

    def _complete(self, key: str, members: dict[str, Entry]) -> Iterator[tuple[str, dict[str, Entry]]]:
        if any(f".{end}" in PICTURES for end in members):
            if len(self.rows) == _MAX_SAMPLES:
                raise DamagedTar(f"has more than {_MAX_SAMPLES:,} samples")
            yield key, members
        elif members:
            self.counts["unpictured"] += 1

    def _add(self, members: Mapping[str, Entry]) -> None:
        picture = next(entry for end, entry in members.items() if f".{end}" in PICTURES)
        mask = next((entry for end, entry in members.items() if end[:5] == "mask." and end[4:] in PICTURES), None)
        if picture.length > pixels.MAX_BYTES:
            raise _BadSample(f"has {picture.length / 1e6:.0f} MB; at most {pixels.MAX_BYTES / 1e6:.0f} MB")
        try:
            size = pixels.size_of(cast(BinaryIO, io.BufferedReader(_Part(self.file, picture))), picture.name, _SETTING)
        except RequestError as error:
            raise _BadSample(str(error).partition(f"{picture.name} ")[2] or str(error)) from None
        head, tail = (self._read(picture, first, count) for first, count in sampled_ends(picture.length))
        values = self._json(members["json"]) if "json" in members else {}
        captions = self._captions(members, values)
        text = json.dumps([picture.name, captions, mask and mask.name])
        digest = tuple(bytes.fromhex(sampled_digest(picture.length, head, tail)))
        second = (mask.offset, mask.length) if mask is not None else (0, 0)
        self.columns |= dict.fromkeys(values)
        for column, value in values.items():
            number = score_of(value) if column not in (*CAPTION_COLUMNS, self.caption_column, "key") else None
            if number is not None and (column in self.scores or len(self.scores) < _MAX_SCORES):
                self.scores.setdefault(column, {})[len(self.rows)] = number
        self.rows.append((picture.offset, picture.length, *second, self.texts.tell(), *size, digest))
        self.texts.write(text.encode())

    def _captions(self, members: Mapping[str, Entry], values: Mapping[str, Any]) -> tuple[str, ...] | None:
        column = self.caption_column or next((name for name in CAPTION_COLUMNS if name in values), "")
        file = next((members[end] for suffix in self.suffixes if (end := suffix.lower()[1:]) in members), None)
        try:
            if file is not None and self.caption_column not in values:
                return caption_lines(self._text(file, MAX_CAPTION), self.path)
            return captions_of(self.path, "", values.get(column), None if column else values.get("tags"))
        except FileError as error:
            why = reason(error).removeprefix(": ").removeprefix("the caption ")
            raise _BadSample(f"the caption {why}") from None

    def _json(self, entry: Entry) -> dict[str, Any]:
        try:
            values = parse_json(self._text(entry, _MAX_JSON))
        except MalformedText as error:
            raise _BadSample(f"its JSON {error}") from None
        if not isinstance(values, dict):
            raise _BadSample("its JSON is not an object")
        return values

    def _text(self, entry: Entry, limit: int) -> str:
        if entry.length > limit:
            raise _BadSample(f"{entry.name} has {entry.length:,} bytes, expected at most {limit:,}")
        try:
            return self._read(entry, 0, entry.length).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _BadSample(f"{entry.name} is not text in UTF-8 (byte {error.start})") from None

    def _read(self, entry: Entry, first: int, count: int) -> bytes:
        self.file.seek(entry.offset + first)
        return self.file.read(count)


class _Part(io.RawIOBase):
    """A member as a file, of which only what is asked for is read."""

    def __init__(self, file: BinaryIO, entry: Entry) -> None:
        self._file, self._entry, self._position = file, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self._entry.length)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._entry.length - self._position))
        self._file.seek(self._entry.offset + self._position)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _digest(body: bytes | memoryview) -> str:
    return hashlib.blake2b(body, digest_size=20).hexdigest()

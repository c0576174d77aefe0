"""Data sets in tar shards, as webdataset has them: NAME.jpg, NAME.txt, NAME.json and NAME.mask.png are a sample.

    a folder with *.tar       one .tar       a pattern: laion-{000000..000123}.tar, {a,b}.tar

Nothing is unpacked: an index of each shard says where its pictures are, see `data.shard_index`.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import overload

import numpy as np

from gouache.data.dataset import DataSet
from gouache.data.listing import some
from gouache.data.members import Member
from gouache.data.record import CaptionOptions, Record
from gouache.data.shard_index import Faults, ShardIndex, index
from gouache.data.subset import Subset
from gouache.errors import FileError, printable
from gouache.wording import plural

SUFFIX = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
LARGE = 20_000  # samples: above, a cache with a file per picture, and decoding all at the start, take too long
_MAX_SHARDS = 100_000
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")

OnIndexed = Callable[[str, int, int], None]
"""(what, done, total) of a work in progress, in shards."""


class ShardRecords(Sequence[Record]):
    """The records of samples in shards, each made when it is asked for. `rows` are counted over all `shards`.

    `subset` has what all of them share, `weights` (N,) their weights if they differ.
    """

    def __init__(
        self,
        shards: Sequence[ShardIndex],
        subset: Subset,
        rows: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        self._shards, self.subset = shards, subset
        self._starts = np.cumsum([0, *map(len, shards)]).tolist()
        self._rows = np.arange(self._starts[-1]) if rows is None else rows
        self._weights = weights

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, row: int) -> Record: ...
    @overload
    def __getitem__(self, row: slice) -> ShardRecords: ...

    def __getitem__(self, row: int | slice) -> Record | ShardRecords:
        if isinstance(row, slice):
            return self.chosen(np.arange(len(self))[row])
        place = int(self._rows[row])
        number = bisect_right(self._starts, place) - 1
        shard = self._shards[number]
        sample = shard.sample(place - self._starts[number])
        record = self.subset.record(
            sample.picture,
            f"{shard.path.name}/{sample.picture.name}",
            sample.captions,
            sample.mask,
            scores=sample.scores,
        )
        return record if self._weights is None else replace(record, weight=float(self._weights[row]))

    def __iter__(self) -> Iterator[Record]:
        return (self[row] for row in range(len(self)))

    def chosen(self, rows: np.ndarray) -> ShardRecords:
        """Those at `rows`, in that order."""
        weights = None if self._weights is None else self._weights[rows]
        return ShardRecords(self._shards, self.subset, self._rows[rows], weights)

    def weighted(self, weights: Sequence[float]) -> ShardRecords:
        return ShardRecords(self._shards, self.subset, self._rows, np.asarray(weights))

    def with_captions(self, options: CaptionOptions) -> ShardRecords:
        return ShardRecords(self._shards, replace(self.subset, caption_options=options), self._rows, self._weights)

    @property
    def columns(self) -> list[str]:
        """The names of their scores."""
        return sorted({column for shard in self._shards for column in shard.columns})

    def scores(self, column: str) -> np.ndarray:
        """(N,), NaN for a sample without this score."""
        return np.concatenate([shard.scores(column) for shard in self._shards])[self._rows]

    def sizes(self) -> np.ndarray:
        """(N, 2): width and height of each picture, upright."""
        return np.concatenate([shard.sizes() for shard in self._shards])[self._rows]

    def digests(self) -> list[str]:
        """The sampled digest of each picture, see `data.members`."""
        return [bytes(each).hex() for each in np.concatenate([shard.digests() for shard in self._shards])[self._rows]]

    def shards(self) -> np.ndarray:
        """(N,): the number of the shard of each."""
        return np.searchsorted(self._starts, self._rows, "right") - 1

    @property
    def identity(self) -> str:
        """A SHA-256 (hexadecimal) of everything in the records, in order; names and times of the shards do not act."""
        options = {each.name: getattr(self.subset, each.name) for each in fields(self.subset) if each.name != "masks"}
        digest = hashlib.sha256(repr([options, [shard.digest for shard in self._shards]]).encode())
        digest.update(np.ascontiguousarray(self._rows, "<i8").tobytes())
        digest.update(b"" if self._weights is None else np.ascontiguousarray(self._weights, "<f8").tobytes())
        return digest.hexdigest()


def is_shards(path: Path) -> bool:
    """Whether `path` names shards: by its end, or by braces in the name of a file that does not exist."""
    return not path.is_dir() and path.name.lower().endswith((SUFFIX, *COMPRESSED))


def expand(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for: numbers {008..010} keep their zeros, {a,b} are alternatives.

    Raises ValueError if there are too many.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, names = match.groups()
    if names is not None:
        inner = names.split(",")
    else:
        low, high, width = int(first), int(last), max(len(first), len(last))
        width = width if first.startswith("0") or last.startswith("0") else 0
        if abs(high - low) >= _MAX_SHARDS:
            raise ValueError
        inner = [str(number).zfill(width) for number in range(low, high + 1) or range(low, high - 1, -1)]
    tails = expand(pattern[match.end() :])
    if len(inner) * len(tails) > _MAX_SHARDS:
        raise ValueError
    return [pattern[: match.start()] + each + tail for each in inner for tail in tails]


def paths_of(path: Path) -> list[Path]:
    """The shards that `path`, a file or a pattern, names. Raises FileError if they are too many or compressed."""
    try:
        found = [path] if path.exists() else [Path(each) for each in expand(str(path))]
    except (ValueError, OSError):
        raise FileError(path, f"names more than {_MAX_SHARDS:,} shards, or is not a possible name") from None
    for each in found:
        if each.name.lower().endswith(COMPRESSED):
            raise FileError(each, "is compressed, and shards are read at any position; decompress it first: gunzip")
    return found


def read(
    paths: Sequence[Path],
    subset: Subset,
    *,
    caption_column: str = "",
    stream: bool = False,
    cache: Path | None = None,
    on_work: OnIndexed | None = None,
) -> DataSet:
    """The data set in the shards `paths`, with notes of what in them is not used.

    `stream`: the records are made when they are asked for, and identified by samples of their bytes. Otherwise they are
    a list, to be decoded before they are used as other pictures are. `cache` is the folder of the indexes. Raises
    FileError if a shard cannot be read or none has a picture.
    """
    shards = list[ShardIndex]()
    for path in paths:
        shards.append(index(path, subset.suffixes, caption_column, cache))
        if on_work is not None:
            on_work("indexing shards", len(shards), len(paths))
    notes = list(_notes(shards))
    if not any(map(len, shards)):
        where = Path(paths[0]) if len(paths) == 1 else paths[0].parent
        raise FileError(where, "; ".join(notes) or "has no pictures; expected NAME.jpg (or .png, .webp, ...) members")
    known = dict.fromkeys(column for shard in shards for column in shard.json_columns)
    if caption_column and caption_column not in known:
        raise FileError(
            paths[0], f"has no JSON with {printable(caption_column)!r}; it has {some(list(known), 20) or 'no columns'}"
        )
    records = ShardRecords(shards, subset)
    return DataSet(records if stream else [_plain(record) for record in records], notes)


def _plain(record: Record) -> Record:
    """A record that is identified by all of its bytes, as those of other files."""
    assert isinstance(record.path, Member)
    return replace(record, path=replace(record.path, digest=""))


def _notes(shards: Sequence[ShardIndex]) -> Iterator[str]:
    for shard in shards:
        faults: Faults = shard.faults
        name = printable(shard.path.name)
        if faults.damage:
            yield f"{name} {printable(faults.damage, 300)}: {plural(len(shard), 'sample')} before that used"
        if faults.bad:
            yield f"{name}: {plural(faults.bad, 'sample')} left out: {_shown(faults)}"
    if count := sum(shard.faults.unpictured for shard in shards):
        yield f"{plural(count, 'sample')} without a picture left out"
    if count := sum(shard.faults.irregular for shard in shards):
        yield f"{plural(count, 'member')} of shards left out: links, devices or named pipes, which are not followed"


def _shown(faults: Faults) -> str:
    rest = faults.bad - len(faults.shown)
    return "; ".join(printable(each, 200) for each in faults.shown) + (f" and {rest} more" if rest else "")

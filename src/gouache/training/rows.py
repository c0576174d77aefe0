"""The rows of batches: pictures at the sizes that they are trained at. Those of large sets are made when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from gouache.data.buckets import Buckets, Crop, Size, crops
from gouache.data.members import Member
from gouache.data.pictures import Examined
from gouache.data.record import Record
from gouache.data.shard_records import ShardRecords


@dataclass(frozen=True)
class Row:
    """A record at one size."""

    record: Record
    content: Examined
    crop: Crop


@dataclass(frozen=True)
class Columns:
    """What the plan of batches needs of all rows: sizes of training, repeats, regularization, numbers of shards."""

    sizes: Sequence[Size]
    repeats: Sequence[int]
    regularization: Sequence[bool]
    shards: Sequence[int]


class StreamedRows(Sequence[Row]):
    """The rows of records in shards. Only two numbers are kept per row."""

    def __init__(self, records: ShardRecords, buckets: Sequence[Buckets]) -> None:
        self._records = records
        known, inverse = np.unique(records.sizes(), axis=0, return_inverse=True)
        inverse = inverse.ravel()
        found = [crops((w, h), buckets, records.subset.resolution) for w, h in known.tolist()]
        self._crops = [crop for of_size in found for crop in of_size]
        counts = np.array([len(of_size) for of_size in found])[inverse]
        firsts = np.cumsum([0, *map(len, found)])[inverse]
        self._places = np.repeat(np.arange(len(records)), counts)
        within = np.arange(len(self._places)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._crop_numbers = np.repeat(firsts, counts) + within

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, row: int) -> Row: ...
    @overload
    def __getitem__(self, row: slice) -> list[Row]: ...

    def __getitem__(self, row: int | slice) -> Row | list[Row]:
        if isinstance(row, slice):
            return [self[each] for each in range(len(self))[row]]
        record = self._records[int(self._places[row])]
        assert isinstance(record.path, Member) and record.path.size is not None
        content = Examined(record.path.digest, record.path.size)
        return Row(record, content, self._crops[self._crop_numbers[row]])

    def __iter__(self) -> Iterator[Row]:
        return (self[row] for row in range(len(self)))

    def columns(self) -> Columns:
        sizes, subset = [crop.size for crop in self._crops], self._records.subset
        return Columns(
            [sizes[number] for number in self._crop_numbers.tolist()],
            [subset.repeats] * len(self),
            [subset.regularization] * len(self),
            self._records.shards()[self._places].tolist(),
        )

    @property
    def identity(self) -> str:
        """A hash of everything that examples depend on, as far as it is in the rows."""
        digest = hashlib.sha256(f"{self._records.identity} {self._crops!r}".encode())
        digest.update(np.ascontiguousarray(self._crop_numbers, "<i8").tobytes())
        return digest.hexdigest()


def rows_of(
    records: Sequence[Record], buckets: Sequence[Buckets], examined: Callable[[], Sequence[Examined]]
) -> Sequence[Row]:
    """The rows of `records`, at a size of each of `buckets`. `examined` reads their contents, which shards' have."""
    if isinstance(records, ShardRecords):
        return StreamedRows(records, buckets)
    rows = list[Row]()
    for record, content in zip(records, examined(), strict=True):
        rows += [Row(record, content, crop) for crop in crops(content.size, buckets, record.resolution)]
    return rows


def columns_of(rows: Sequence[Row]) -> Columns:
    if isinstance(rows, StreamedRows):
        return rows.columns()
    numbers = dict[object, int]()
    shards = [
        numbers.setdefault(path.shard, len(numbers)) if isinstance(path := row.record.path, Member) else -1
        for row in rows
    ]
    return Columns(
        [row.crop.size for row in rows],
        [row.record.repeats for row in rows],
        [row.record.regularization for row in rows],
        shards,
    )

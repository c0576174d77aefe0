"""The records of the samples in tar shards: a sequence of which only the row numbers are in memory."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import overload

import numpy as np

from gouache.data.record import CaptionOptions, Record
from gouache.data.shard_index import ShardIndex
from gouache.data.subset import Subset


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

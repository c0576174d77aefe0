"""The order in which examples are seen: epochs of batches, each of one size, as a function of the batch's number."""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class _Part:
    """Batches of one size, from number `first` on: `head` finishes epoch `epoch - 1`, then epochs from `epoch` on.

    `starts` are the numbers at which these begin, counted from the end of `head`, as far as they are known.
    """

    first: int
    batch: int
    head: list[list[int]]
    epoch: int
    starts: list[int] = field(default_factory=lambda: [0])


class Plan:
    """Batches of at most `batch` rows. `plan.batch(number)` needs nothing but the number, so a run resumes anywhere.

    Row i has size `sizes[i]` and is seen exactly `repeats[i]` times per epoch. Rows of different sizes are not mixed:
    the last batch of each size may be short, and nothing is left out. Within an epoch both the rows of a size and the
    batches of all sizes are in random order. `generator` returns the random generator of an epoch. `regularization`
    marks the rows that are seen as often as the others together, see `balance`; without it, all are seen by `repeats`.

    `shards` are the numbers, from 0, of the files that rows are read from; below 0 for others. Then an epoch goes
    through the shards in random order, `window` at a time: rows are in random order within the window, and only what
    does not fill a batch goes on to the next one, so that reading stays local and batches as full as without.

    `changes` (number, batch), in order: from batch `number` on, batches have that many rows, beginning with those that
    the current epoch still lacks.

    `len(plan)` is the number of batches of the first epoch, with the last batch size; where `balance` chooses rows of
    several sizes, epochs can differ in it. `examples` is the number of rows seen per epoch, `cycle` the number of
    epochs in which each row has been seen.
    """

    def __init__(
        self,
        sizes: Sequence[Hashable],
        repeats: Sequence[int],
        batch: int,
        generator: Callable[[int], torch.Generator],
        changes: Sequence[tuple[int, int]] = (),
        regularization: Sequence[bool] = (),
        shards: Sequence[int] = (),
        window: int = 0,
    ) -> None:
        self._sizes, self._repeats, self._generator = sizes, repeats, generator
        self._regularization = regularization or [False] * len(repeats)
        self._shards, self._window = (shards, window) if window > 0 and max(shards, default=0) >= window else ((), 0)
        self._known: tuple[int, int, list[list[int]]] = (-1, 0, [])
        self._lengths = dict[tuple[int, int], int]()
        self._lock = threading.Lock()
        self.examples = len(self._rows(0))
        classes = sum(self._regularization)
        others = sum(count for count, kind in zip(repeats, self._regularization, strict=True) if not kind)
        self.cycle = max(1, -(-classes // others)) if others else 1
        # Epochs after which the same rows are seen.
        self._period = classes // math.gcd(classes, others) if classes and others else 1
        self._parts = [_Part(0, batch, [], 0)]
        for number, size in changes if self.examples else ():
            self._parts.append(self._changed(number, size))

    def __len__(self) -> int:
        return self.total(1)

    def total(self, epochs: int) -> int:
        """The number of batches of the first `epochs` epochs, with the last batch size."""
        return sum(self._length(epoch, self._parts[-1].batch) for epoch in range(epochs))

    def batch(self, number: int) -> tuple[int, list[int]]:
        """The epoch of batch `number`, counted from 0, and its rows."""
        part = self._part(number)
        index = number - part.first
        if index < len(part.head):
            return part.epoch - 1, part.head[index]
        epoch, index = self._located(part, index - len(part.head))
        return epoch, self._order(epoch, part.batch)[index]

    def full(self, number: int) -> int:
        """How many rows batch `number` has if it is not a short one."""
        return self._part(number).batch

    def _part(self, number: int) -> _Part:
        return next(part for part in reversed(self._parts) if part.first <= number)

    def _changed(self, number: int, batch: int) -> _Part:
        """The part that begins at `number`, after those that are known."""
        epoch, rows = self.batch(number)
        if number and self.batch(number - 1)[0] == epoch:
            left, after = list(rows), number + 1
            while self.batch(after)[0] == epoch:
                left += self.batch(after)[1]
                after += 1
            return _Part(number, batch, self._shuffled(left, batch, self._generator(epoch)), epoch + 1)
        return _Part(number, batch, [], epoch)

    def _located(self, part: _Part, index: int) -> tuple[int, int]:
        """The epoch of batch `index` after the head of `part`, and its number in the epoch."""
        with self._lock:
            while part.starts[-1] <= index:
                part.starts.append(part.starts[-1] + self._length(part.epoch + len(part.starts) - 1, part.batch))
        known = bisect_right(part.starts, index) - 1
        return part.epoch + known, index - part.starts[known]

    def _order(self, epoch: int, batch: int) -> list[list[int]]:
        with self._lock:  # several threads prepare batches
            if self._known[:2] != (epoch, batch):
                self._known = epoch, batch, self._shuffled(self._rows(epoch), batch, self._generator(epoch))
            return self._known[2]

    def _shuffled(self, rows: Sequence[int], batch: int, generator: torch.Generator) -> list[list[int]]:
        batches = []
        windows = self._windows(generator)
        for group in self._groups(rows):
            order = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
            if windows:
                order.sort(key=windows.__getitem__)  # stable: still random within a window
            batches += [order[first : first + batch] for first in range(0, len(order), batch)]
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        if windows:
            batches.sort(key=lambda rows: windows[rows[-1]])  # the window in which it is full
        return batches

    def _windows(self, generator: torch.Generator) -> list[int]:
        """The number of the window of each row in an epoch; empty if all are in one."""
        if not self._shards:
            return []
        count = max(self._shards) + 1
        of_shard = (torch.randperm(count, generator=generator) // self._window).tolist()
        anywhere = torch.randint(max(of_shard) + 1, (len(self._shards),), generator=generator).tolist()
        return [of_shard[shard] if shard >= 0 else other for shard, other in zip(self._shards, anywhere)]

    def _length(self, epoch: int, batch: int) -> int:
        """The number of batches of an epoch."""
        key = epoch % self._period, batch
        if key not in self._lengths:
            self._lengths[key] = sum(-(-len(group) // batch) for group in self._groups(self._rows(epoch)))
        return self._lengths[key]

    def _rows(self, epoch: int) -> list[int]:
        counts = balance(self._repeats, self._regularization, epoch)
        return [row for row, count in enumerate(counts) for _ in range(count)]

    def _groups(self, rows: Sequence[int]) -> list[list[int]]:
        """`rows` by their size."""
        groups: dict[Hashable, list[int]] = {}
        for row in rows:
            groups.setdefault(self._sizes[row], []).append(row)
        return list(groups.values())


def balance(repeats: Sequence[int], regularization: Sequence[bool], epoch: int = 0) -> list[int]:
    """`repeats` with those of regularization rows changed so that as many of them are seen as of the others.

    Each is seen equally often in an epoch, or once more than another. The next epoch goes on with the row after the
    last one, so over all epochs too each is seen equally often, or once more than another. Without one of the two kinds
    nothing is changed.
    """
    members = [row for row, kind in enumerate(regularization) if kind]
    wanted = sum(count for count, kind in zip(repeats, regularization, strict=True) if not kind)
    balanced = list(repeats)
    if members and wanted:
        each, rest = divmod(wanted, len(members))
        for place, row in enumerate(members):
            balanced[row] = each + ((place - epoch * wanted) % len(members) < rest)
    return balanced

"""The order in which examples are seen: epochs of batches, each of one size, as a function of the batch's number."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class _Part:
    """Batches of one size, from number `first` on: `head` finishes epoch `epoch - 1`, then epochs from `epoch` on."""

    first: int
    batch: int
    head: list[list[int]]
    epoch: int
    length: int


class Plan:
    """Batches of at most `batch` rows. `plan.batch(number)` needs nothing but the number, so a run resumes anywhere.

    Row i has size `sizes[i]` and is seen exactly `repeats[i]` times per epoch. Rows of different sizes are not mixed:
    the last batch of each size may be short, and nothing is left out. Within an epoch both the rows of a size and the
    batches of all sizes are in random order. `generator` returns the random generator of an epoch.

    `changes` (number, batch), in order: from batch `number` on, batches have that many rows, beginning with those that
    the current epoch still lacks.

    `len(plan)` is the number of batches per epoch after all changes, `examples` the number of rows seen in it.
    """

    def __init__(
        self,
        sizes: Sequence[Hashable],
        repeats: Sequence[int],
        batch: int,
        generator: Callable[[int], torch.Generator],
        changes: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._sizes, self._generator = sizes, generator
        self._rows = [row for row, count in enumerate(repeats) for _ in range(count)]
        self._known: tuple[int, int, list[list[int]]] = (-1, 0, [])
        self._lock = threading.Lock()
        self.examples = len(self._rows)
        self._parts = [_Part(0, batch, [], 0, self._count(batch))]
        for number, size in changes if self._rows else ():
            self._parts.append(self._changed(number, size))

    def __len__(self) -> int:
        return self._parts[-1].length

    def batch(self, number: int) -> tuple[int, list[int]]:
        """The epoch of batch `number`, counted from 0, and its rows."""
        part = self._part(number)
        index = number - part.first
        if index < len(part.head):
            return part.epoch - 1, part.head[index]
        epoch, index = divmod(index - len(part.head), part.length)
        return part.epoch + epoch, self._order(part.epoch + epoch, part.batch)[index]

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
            head = self._shuffled(left, batch, self._generator(epoch))
            return _Part(number, batch, head, epoch + 1, self._count(batch))
        return _Part(number, batch, [], epoch, self._count(batch))

    def _order(self, epoch: int, batch: int) -> list[list[int]]:
        with self._lock:  # several threads prepare batches
            if self._known[:2] != (epoch, batch):
                self._known = epoch, batch, self._shuffled(self._rows, batch, self._generator(epoch))
            return self._known[2]

    def _shuffled(self, rows: Sequence[int], batch: int, generator: torch.Generator) -> list[list[int]]:
        batches = []
        for group in self._groups(rows):
            order = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
            batches += [order[first : first + batch] for first in range(0, len(order), batch)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def _count(self, batch: int) -> int:
        return sum(-(-len(group) // batch) for group in self._groups(self._rows))

    def _groups(self, rows: Sequence[int]) -> list[list[int]]:
        """`rows` by their size."""
        groups: dict[Hashable, list[int]] = {}
        for row in rows:
            groups.setdefault(self._sizes[row], []).append(row)
        return list(groups.values())


def balance(repeats: Sequence[int], regularization: Sequence[bool]) -> list[int]:
    """`repeats` with those of regularization rows changed so that as many of them are seen as of the others.

    Each is seen equally often, or once more than another; if there are more of them than needed, the last are not seen.
    Without one of the two kinds nothing is changed.
    """
    members = [row for row, kind in enumerate(regularization) if kind]
    wanted = sum(count for count, kind in zip(repeats, regularization, strict=True) if not kind)
    balanced = list(repeats)
    if members and wanted:
        each, rest = divmod(wanted, len(members))
        for place, row in enumerate(members):
            balanced[row] = each + (place < rest)
    return balanced

"""The order in which examples are seen: epochs of batches, each of one size, as a function of the batch's number."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence

import torch


class Plan:
    """Batches of at most `batch` rows. `plan.batch(number)` needs nothing but the number, so a run resumes anywhere.

    Row i has size `sizes[i]` and is seen exactly `repeats[i]` times per epoch. Rows of different sizes are not mixed:
    the last batch of each size may be short, and nothing is left out. Within an epoch both the rows of a size and the
    batches of all sizes are in random order. `generator` returns the random generator of an epoch.

    `len(plan)` is the number of batches per epoch, `examples` the number of rows seen in it.
    """

    def __init__(
        self,
        sizes: Sequence[Hashable],
        repeats: Sequence[int],
        batch: int,
        generator: Callable[[int], torch.Generator],
    ) -> None:
        self._batch, self._generator = batch, generator
        groups: dict[Hashable, list[int]] = {}
        for row, (size, count) in enumerate(zip(sizes, repeats, strict=True)):
            groups.setdefault(size, []).extend([row] * count)
        self._groups = [rows for rows in groups.values() if rows]
        self._length = sum(-(-len(rows) // batch) for rows in self._groups)
        self.examples = sum(map(len, self._groups))
        self._known: tuple[int, list[list[int]]] = (-1, [])
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._length

    def batch(self, number: int) -> tuple[int, list[int]]:
        """The epoch of batch `number`, counted from 0, and its rows."""
        epoch, index = divmod(number, self._length)
        with self._lock:  # several threads prepare batches
            if self._known[0] != epoch:
                self._known = epoch, self._order(epoch)
            return epoch, self._known[1][index]

    def _order(self, epoch: int) -> list[list[int]]:
        generator = self._generator(epoch)
        batches = []
        for rows in self._groups:
            order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            batches += [order[first : first + self._batch] for first in range(0, len(order), self._batch)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


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

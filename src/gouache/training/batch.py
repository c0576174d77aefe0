"""A batch of training examples: what the data gives to an objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gouache.diffusion.conditioning import Conditioning
from gouache.prompts.encode import Sizes


@dataclass(frozen=True)
class Part:
    """The part of a batch that one of several `processes` has: `rows` of `count`.

    `captions` are those of all rows, and `chunks` the numbers of chunks that they are encoded in, if these are known.
    `regularization` is the number of all rows that are of the class.
    """

    rows: range
    count: int
    processes: int
    captions: tuple[str, ...] = ()
    chunks: tuple[int, ...] = ()
    regularization: int = 0

    @property
    def own(self) -> slice:
        return slice(self.rows.start, self.rows.stop)

    def longest(self, dropped: Sequence[bool]) -> str | None:
        """A caption of another process that is encoded in more chunks than all of this one; None if there is none.

        Captions that are `dropped` (count,) are empty, of one chunk.
        """
        if not self.chunks:
            return None
        chunks = [1 if drop else number for drop, number in zip(dropped, self.chunks, strict=True)]
        return self.captions[chunks.index(max(chunks))] if max(chunks) > max(chunks[self.own]) else None


def part_rows(rank: int, size: int, count: int) -> range:
    """The rows of a batch of `count` that process `rank` of `size` has: none if there are fewer rows than processes."""
    return range(count * rank // size, count * (rank + 1) // size)


@dataclass(frozen=True)
class Batch:
    """B examples of one size.

    `latents` (B, C, h, w) are scaled to about unit variance. `conditioning` has B rows; None if the captions must be
    encoded now because a text encoder or an embedding is trained: then `captions` and `sizes` (for families that use
    them) have B entries, and `concat` (B, E, h, w) the further input channels of an inpainting model. `weights` (B,)
    multiply the losses; None means 1. `mask` (B, 1, h, w), 0 to 1, limits the loss to a part of each picture.
    `regularization` (B,) marks examples of the class. `names` name the pictures in messages, `contents` are hashes.

    With several processes, `part` says which rows these are of the batch that all of them have together. The weights
    are then such that the mean of the losses over the processes is that of the whole batch. `longest` is a caption that
    another process has: conditioning encoded now is as long as that of the whole batch.
    """

    latents: Tensor
    conditioning: Conditioning | None = None
    captions: tuple[str, ...] = ()
    sizes: tuple[Sizes, ...] = ()
    concat: Tensor | None = None
    weights: Tensor | None = None
    mask: Tensor | None = None
    regularization: Tensor | None = None
    names: tuple[str, ...] = ()
    contents: tuple[str, ...] = ()
    part: Part | None = None
    longest: str | None = None

    def __len__(self) -> int:
        return len(self.latents)

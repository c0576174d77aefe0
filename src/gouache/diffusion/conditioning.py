"""What the network is told besides x and sigma: text, one vector, extra channels. A value, joined and cut by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gouache.errors import RequestError


@dataclass(frozen=True, eq=False)
class Conditioning:
    """B rows of what a network is told.

    `context` (B, N, D) is what cross-attention reads: N is 77 for each chunk of the prompt. `vector` (B, V) is added
    to the time embedding (SDXL). `concat` (B, C, h, w) are channels joined to x after it is scaled (inpainting,
    instruct-pix2pix, depth).
    """

    context: Tensor
    vector: Tensor | None = None
    concat: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context)

    @property
    def tokens(self) -> int:
        """N, the length of the context."""
        return self.context.shape[1]

    def rows(self, index: slice | list[int]) -> Conditioning:
        """The rows chosen by a slice or a list of indices, in that order."""
        return self._each(lambda tensor: tensor[index])

    def repeat(self, count: int) -> Conditioning:
        """All rows `count` times over: a b -> a b a b."""
        return self._each(lambda tensor: tensor.repeat(count, *[1] * (tensor.ndim - 1)))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """The same on another device or in another dtype."""
        return self._each(lambda tensor: tensor.to(device=device, dtype=dtype))

    def pad_to(self, chunks: int, empty: Tensor) -> Conditioning:
        """Lengthen the context to `chunks` chunks with copies of `empty` (1, 77, D), the encoding of an empty prompt.

        This is how A1111 makes the shorter of two prompts as long as the other. A context that is already as long,
        or longer, stays as it is.
        """
        missing = chunks - self.tokens // empty.shape[1]
        if missing <= 0:
            return self
        filling = empty.to(self.context).repeat(len(self), missing, 1)
        return Conditioning(torch.cat([self.context, filling], dim=1), self.vector, self.concat)

    def stacks_with(self, other: Conditioning) -> bool:
        """Whether the rows of both can stand in one batch: the same parts of the same shapes."""
        return self._row_shapes == other._row_shapes

    @property
    def _row_shapes(self) -> list[tuple[int, ...] | None]:
        parts = (self.context, self.vector, self.concat)
        return [None if part is None else tuple(part.shape[1:]) for part in parts]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        def optional(part: Tensor | None) -> Tensor | None:
            return None if part is None else change(part)

        return Conditioning(change(self.context), optional(self.vector), optional(self.concat))


def stack(*conditionings: Conditioning) -> Conditioning:
    """The rows of all of them in one batch, in order. They need the same parts, of the same shapes but for B."""
    first = conditionings[0]
    for other in conditionings[1:]:
        if not first.stacks_with(other):
            shapes = f"{first._row_shapes} and {other._row_shapes}"
            raise RequestError("conditioning", f"rows of shapes {shapes} cannot stand in one batch; pad them first")
    return Conditioning(
        torch.cat([each.context for each in conditionings]),
        _joined([each.vector for each in conditionings]),
        _joined([each.concat for each in conditionings]),
    )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None

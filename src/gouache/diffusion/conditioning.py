"""Conditioning: everything a network receives besides x and sigma, as named parts that are batched and cut by row.

A part is a tensor whose first dimension is the batch, or a tuple of such tensors. `Conditioning._map` and `_join` are
the only code that looks inside a part: a new part is one new field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from gouache.errors import RequestError

Part = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Conditioning:
    """B rows of conditioning.

    `context` (B, N, D) is the input of cross-attention; for text N is 77 per chunk of the prompt. `vector` (B, V) is
    added to the time embedding (SDXL). `concat` (B, C, h, w) are channels concatenated to x after it is scaled
    (inpainting, instruct-pix2pix, depth). `image_tokens` (B, M, D) are the input of an image prompt's own attention
    (IP-Adapter). `control` are a control net's residuals, each (B, C, h, w).
    """

    context: Tensor
    vector: Tensor | None = None
    concat: Tensor | None = None
    image_tokens: Tensor | None = None
    control: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        return len(self.context)

    @property
    def parts(self) -> dict[str, Part]:
        """The parts that are present, by name."""
        values = ((each.name, getattr(self, each.name)) for each in fields(self))
        return {name: value for name, value in values if value is not None}

    @property
    def tokens(self) -> int:
        """N, the length of the context."""
        return self.context.shape[1]

    def rows(self, index: slice | list[int]) -> Conditioning:
        """The rows selected by a slice or a list of indices, in that order."""
        return self._map(lambda tensor: tensor[index])

    def repeat(self, count: int) -> Conditioning:
        """All rows `count` times: a b -> a b a b."""
        return self._map(lambda tensor: tensor.repeat(count, *[1] * (tensor.ndim - 1)))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """A copy on another device or in another dtype."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def pad_to(self, chunks: int, empty: Tensor) -> Conditioning:
        """Extend the context to `chunks` chunks with copies of `empty` (1, 77, D), the encoding of an empty prompt.

        This is how A1111 makes the shorter of two prompts as long as the other. A context that is already as long,
        or longer, is returned unchanged.
        """
        missing = chunks - self.tokens // empty.shape[1]
        if missing <= 0:
            return self
        padding = empty.to(self.context).repeat(len(self), missing, 1)
        return replace(self, context=torch.cat([self.context, padding], dim=1))

    def extend_to(self, tokens: int) -> Conditioning:
        """Extend the context to `tokens` by repeating its last token, as A1111 does for the parts of an `AND`."""
        missing = tokens - self.tokens
        if missing <= 0:
            return self
        last = self.context[:, -1:].expand(-1, missing, -1)
        return replace(self, context=torch.cat([self.context, last], dim=1))

    def where(self, mask: Tensor, other: Conditioning) -> Conditioning:
        """The rows of `other` where `mask` (B,) is true, these rows elsewhere.

        `other` has B rows or one. A part that `other` does not have is kept in every row, so that an inpainting
        model keeps its mask channels when its caption is dropped. If its context is shorter it is repeated, so a
        caption of several chunks is replaced by as many empty ones. Raises RequestError where a part of `other` is
        missing here or has another shape.
        """
        lengths = self.tokens, other.tokens
        if lengths[0] != lengths[1]:
            if lengths[0] % lengths[1]:
                raise RequestError("conditioning", f"contexts of {lengths[0]} and {lengths[1]} tokens cannot be mixed")
            other = replace(other, context=other.context.repeat(1, lengths[0] // lengths[1], 1))
        mixed: dict[str, Part] = {}
        for name, there in other.parts.items():
            here = self.parts.get(name)
            if here is None or _shapes(here) != _shapes(there):
                raise RequestError(
                    "conditioning", f"part {name} has shape {_shapes(there)} in one and {_shapes(here)} in the other"
                )
            mixed[name] = _zip(lambda a, b: _select(mask, b, a), here, there)
        return replace(self, **mixed)

    def stacks_with(self, other: Conditioning) -> bool:
        """Whether both fit into one batch: the same parts of the same shapes but for B."""
        return self._row_shapes == other._row_shapes

    @property
    def _row_shapes(self) -> Mapping[str, object]:
        return {name: _shapes(part) for name, part in self.parts.items()}

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(**{name: _each(change, part) for name, part in self.parts.items()})  # type: ignore[arg-type]


def stack(*conditionings: Conditioning) -> Conditioning:
    """The rows of all of them in one batch, in order. Raises RequestError unless all have the same parts and shapes."""
    first = conditionings[0]
    for other in conditionings[1:]:
        if not first.stacks_with(other):
            raise RequestError(
                "conditioning",
                f"rows of shapes {dict(first._row_shapes)} and {dict(other._row_shapes)} cannot be batched; "
                "pad them first",
            )
    joined = {name: _join([each.parts[name] for each in conditionings]) for name in first.parts}
    return Conditioning(**joined)  # type: ignore[arg-type]


def _each(change: Callable[[Tensor], Tensor], part: Part) -> Part:
    return change(part) if isinstance(part, Tensor) else tuple(change(tensor) for tensor in part)


def _zip(change: Callable[[Tensor, Tensor], Tensor], one: Part, two: Part) -> Part:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return change(one, two)
    return tuple(change(a, b) for a, b in zip(one, two))


def _join(parts: Sequence[Part]) -> Part:
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if tensors:
        return torch.cat(tensors)
    return tuple(torch.cat(group) for group in zip(*(part for part in parts if not isinstance(part, Tensor))))


def _shapes(part: Part | None) -> object:
    """The shape of a row of each tensor."""
    if part is None:
        return None
    return tuple(part.shape[1:]) if isinstance(part, Tensor) else [tuple(tensor.shape[1:]) for tensor in part]


def _select(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(mask.to(no.device).reshape(-1, *[1] * (no.ndim - 1)), yes.to(no), no)

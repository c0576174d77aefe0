"""The differences of two models: names, shapes, dtypes, and the distances of their weights, component by component."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gouache.errors import printable
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.record import ITEM_SIZE, ModelFile

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorDifference:
    """The difference of one tensor and its counterpart: the largest of two elements, and |a - b| / |a| of the whole."""

    name: str
    largest: float
    relative: float


@dataclass(frozen=True)
class Part:
    """A component: `same` of its `tensors` have equal values; `relative` is |a - b| / |a| over all of them."""

    name: str
    tensors: int
    same: int
    relative: float


@dataclass(frozen=True)
class Difference:
    """`only_a`, `only_b`: names that are missing in the other model. `shapes`, `dtypes`: "name: a's, b's". `parts` and
    `furthest` (the tensors with the largest relative difference) compare values, in float64.
    """

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    metadata: tuple[str, ...]
    parts: tuple[Part, ...]
    furthest: tuple[TensorDifference, ...]

    @property
    def equal(self) -> bool:
        """Whether both hold the same tensors with the same values; dtypes and metadata may differ."""
        return not (self.only_a or self.only_b or self.shapes) and all(part.same == part.tensors for part in self.parts)


def diff(a: ModelFile, b: ModelFile, on_bytes: Callable[[int], None] | None = None, most: int = 10) -> Difference:
    """The differences of `a` and `b`. Tensors are paired by name: convert one of the files first if layouts differ."""
    import torch

    common = [name for name in a if name in b]
    shapes = [name for name in common if a.tensors[name].shape != b.tensors[name].shape]
    dtypes = [name for name in common if a.tensors[name].dtype != b.tensors[name].dtype]
    component_of = _component_of(identify(a))
    sums: dict[str, list[float]] = {}
    unequal = list[TensorDifference]()
    for name in common:
        if name in shapes:
            continue
        x, y = a.tensor(name), b.tensor(name)
        equal = x.dtype == y.dtype and torch.equal(_bits(x), _bits(y))
        distance = length = largest = 0.0
        if not equal:
            u, v = x.double(), y.double()
            gap = u - v
            distance, length = float(gap.pow(2).sum()), float(u.pow(2).sum())
            largest = float(gap.abs().max()) if gap.numel() else 0.0
            equal = distance == 0
        elif x.is_floating_point():
            length = float(x.float().pow(2).sum())
        total = sums.setdefault(component_of.get(name, "other tensors"), [0, 0, 0.0, 0.0])
        for index, amount in enumerate((1, equal, distance, length)):
            total[index] += amount
        if not equal:
            unequal.append(TensorDifference(printable(name), largest, _ratio(distance, length)))
        if on_bytes is not None:
            on_bytes(a.tensors[name].elements * ITEM_SIZE[a.tensors[name].dtype])
    unequal.sort(key=lambda each: -each.relative if each.relative == each.relative else -math.inf)
    return Difference(
        only_a=tuple(printable(name) for name in a if name not in b),
        only_b=tuple(printable(name) for name in b if name not in a),
        shapes=tuple(_both(name, a.tensors[name].shape, b.tensors[name].shape) for name in shapes),
        dtypes=tuple(_both(name, a.tensors[name].dtype, b.tensors[name].dtype) for name in dtypes),
        metadata=tuple(
            printable(key) for key in sorted({*a.metadata, *b.metadata}) if a.metadata.get(key) != b.metadata.get(key)
        ),
        parts=tuple(
            Part(name, int(count), int(same), _ratio(distance, length))
            for name, (count, same, distance, length) in sums.items()
        ),
        furthest=tuple(unequal[:most]),
    )


def _bits(tensor: Tensor) -> Tensor:
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8)


def _ratio(distance: float, length: float) -> float:
    return math.sqrt(distance / length) if length else (0.0 if not distance else math.inf)


def _component_of(found: Found) -> dict[str, str]:
    """{name of a tensor in the file: name of its component}."""
    return {
        source: component.name
        for component in found.components.values()
        for origin in component.origins.values()
        for source in origin.sources
    }


def _both(name: str, first: object, second: object) -> str:
    return f"{printable(name)}: {first}, {second}"

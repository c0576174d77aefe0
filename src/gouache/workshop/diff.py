"""The differences of two models: names, shapes, dtypes, and the distances of their weights, component by component."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gouache.errors import ModelError, printable
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile, TensorInfo
from gouache.workshop import derive, layout

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
    """`only_a`, `only_b`: tensors that are missing in the other model. `shapes`, `dtypes`: "name: a's, b's". `parts`
    and `furthest` (the tensors with the largest relative difference) compare values, in float64.
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


def open_both(a: Path, b: Path) -> tuple[ModelFile, ModelFile]:
    """The models at both paths. Raises FileError.

    If one is a diffusers folder and the other is not, the folder has the names of a single file, with its leftovers.
    """
    files = [open_model(a), open_model(b)]
    folders = [file.format == "diffusers folder" for file in files]
    if folders[0] != folders[1]:
        index = folders.index(True)
        with suppress(ModelError):  # a folder that is not a whole model keeps its names
            files[index] = layout.opened((a, b)[index])[0]
    return files[0], files[1]


def diff(a: ModelFile, b: ModelFile, on_bytes: Callable[[int], None] | None = None, most: int = 10) -> Difference:
    """The differences of `a` and `b`.

    Tensors of components that both have are paired by the names of the network, whatever the layout; others by their
    names in the files.
    """
    import torch

    found_a, found_b = identify(a), identify(b)
    shared = [name for name in found_a.components if name in found_b.components]
    view_a, view_b = _by_network(a, found_a, shared), _by_network(b, found_b, shared)
    labels = _labels(view_a, view_b)
    common = [key for key in view_a.tensors if key in view_b.tensors]
    infos = {key: (view_a.tensors[key], view_b.tensors[key]) for key in common}
    shapes = {key for key, (one, other) in infos.items() if one.shape != other.shape}
    component_of = _component_of(found_a)
    sums: dict[str, list[float]] = {}
    unequal = list[TensorDifference]()
    for key in common:
        if key in shapes:
            continue
        x, y = view_a.read(key), view_b.read(key)
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
        total = sums.setdefault(key[0] or component_of.get(key[1], "other tensors"), [0, 0, 0.0, 0.0])
        for index, amount in enumerate((1, equal, distance, length)):
            total[index] += amount
        if not equal:
            unequal.append(TensorDifference(printable(labels[key]), largest, _ratio(distance, length)))
        if on_bytes is not None:
            on_bytes(infos[key][0].nbytes)
    unequal.sort(key=lambda each: -each.relative if each.relative == each.relative else -math.inf)
    dtypes = [key for key, (one, other) in infos.items() if one.dtype != other.dtype]
    return Difference(
        only_a=tuple(printable(labels[key]) for key in view_a.tensors if key not in view_b.tensors),
        only_b=tuple(printable(labels[key]) for key in view_b.tensors if key not in view_a.tensors),
        shapes=tuple(_both(labels[key], *(info.shape for info in infos[key])) for key in common if key in shapes),
        dtypes=tuple(_both(labels[key], *(info.dtype for info in infos[key])) for key in dtypes),
        metadata=tuple(
            printable(key) for key in sorted({*a.metadata, *b.metadata}) if a.metadata.get(key) != b.metadata.get(key)
        ),
        parts=tuple(
            Part(name, int(count), int(same), _ratio(distance, length))
            for name, (count, same, distance, length) in sums.items()
        ),
        furthest=tuple(unequal[:most]),
    )


_Key = tuple[str, str]
"""(component, the network's name), or ("", the name in the file) of a tensor that no shared component has."""


@dataclass(frozen=True)
class _View:
    """A file's tensors by key. `sources` has the name in the file of each tensor that is a whole one there."""

    tensors: Mapping[_Key, TensorInfo]
    read: Callable[[_Key], Tensor]
    sources: Mapping[_Key, str]


def _by_network(file: ModelFile, found: Found, shared: Sequence[str]) -> _View:
    parts = {name: derive.arrange(file, found.components[name].origins) for name in shared}
    origins = {(name, key): origin for name in shared for key, origin in found.components[name].origins.items()}
    uses = Counter(source for origin in origins.values() for source in origin.sources)
    rest = [name for name in file if name not in uses]
    tensors = {(name, key): info for name, part in parts.items() for key, info in part.tensors.items()}
    tensors |= {("", name): file.tensors[name] for name in rest}
    sources = {key: origin.sources[0] for key, origin in origins.items()
               if len(origin.sources) == 1 and uses[origin.sources[0]] == 1}  # fmt: skip
    sources |= {("", name): name for name in rest}
    return _View(tensors, lambda key: parts[key[0]].read(key[1]) if key[0] else file.tensor(key[1]), sources)


def _labels(a: _View, b: _View) -> dict[_Key, str]:
    """What each tensor is called in the report: its name in the files, if both have the same, else the network's."""
    labels: dict[_Key, str] = {}
    for key in (*a.tensors, *b.tensors):
        names = {view.sources.get(key, "") for view in (a, b) if key in view.tensors}
        name = names.pop() if len(names) == 1 else ""
        labels[key] = name or "/".join(part for part in key if part)
    return labels


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

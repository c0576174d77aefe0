"""A layout as a table of rules, each saying what one kind of tensor is called on either side.

A pattern is a name in which `{i}` stands for one dotted segment and `{rest*}` for all that are left; what they
stood for on one side stands in the same places on the other. The first rule that matches a name counts, so an
exception goes before the general case. All rules but Join make views: nothing is copied, mapped files stay mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from gouache.errors import ModelError, printable

if TYPE_CHECKING:
    from torch import Tensor

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Rename:
    source: str
    target: str


@dataclass(frozen=True)
class Transpose:
    """A matrix stored the other way round: (a, b) -> (b, a)."""

    source: str
    target: str


@dataclass(frozen=True)
class AsConv:
    """A linear layer's matrix as a 1x1 convolution: (out, in) -> (out, in, 1, 1)."""

    source: str
    target: str


@dataclass(frozen=True)
class AsLinear:
    """A 1x1 convolution as a linear layer's matrix: (out, in, 1, 1) -> (out, in)."""

    source: str
    target: str


@dataclass(frozen=True)
class Split:
    """One tensor that holds several of equal size, stacked along its first dimension."""

    source: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Join:
    """Several tensors stacked along the first dimension into one. The only rule that copies."""

    sources: tuple[str, ...]
    target: str


@dataclass(frozen=True)
class Drop:
    """A tensor that no network needs, and why."""

    source: str
    reason: str


Rule: TypeAlias = Rename | Transpose | AsConv | AsLinear | Split | Join | Drop


@dataclass(frozen=True)
class Origin:
    """Where one tensor comes from: which to read (`sources`) and what `rule` does to them; `part` of a Split."""

    rule: Rule
    sources: tuple[str, ...]
    part: int = 0

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """The shape it will have, from the shapes of its sources; ModelError if the rule cannot apply to them."""
        first = shapes[self.sources[0]]
        match self.rule:
            case Transpose() if len(first) == 2:
                return first[::-1]
            case AsConv() if len(first) == 2:
                return (*first, 1, 1)
            case AsLinear() if len(first) == 4 and first[2:] == (1, 1):
                return first[:2]
            case Split(targets=targets) if first and first[0] % len(targets) == 0:
                return (first[0] // len(targets), *first[1:])
            case Join() if all(shapes[name] == first for name in self.sources) and first:
                return (first[0] * len(self.sources), *first[1:])
            case Rename():
                return first
        found = ", ".join(f"{printable(name)} {list(shapes[name])}" for name in self.sources)
        raise ModelError(f"cannot apply {type(self.rule).__name__} to {found}: the file is not in the layout it seems")

    def tensor(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor itself, a view of what `read` gives for its sources (of a Join, a copy)."""
        tensors = [read(name) for name in self.sources]
        self.shape({name: tuple(tensor.shape) for name, tensor in zip(self.sources, tensors)})
        match self.rule:
            case Transpose():
                return tensors[0].T
            case AsConv():
                return tensors[0][..., None, None]
            case AsLinear():
                return tensors[0][..., 0, 0]
            case Split(targets=targets):
                return tensors[0].chunk(len(targets))[self.part]
            case Join():
                import torch  # the one rule that needs it; listing a file must not wait for torch

                return torch.cat(tensors)
            case _:
                return tensors[0]


@dataclass(frozen=True)
class Plan:
    """A table applied to the names of one file. `dropped` maps names to reasons; `unnamed` no rule spoke of."""

    origins: Mapping[str, Origin]
    dropped: Mapping[str, str]
    unnamed: tuple[str, ...]


def plan(rules: Iterable[Rule], names: Iterable[str]) -> Plan:
    """Which tensor of the target layout comes from which of `names`.

    ModelError if two come to the same name, or if some part of a Join is not there.
    """
    present = set(names)
    find = _finder(rules)
    origins: dict[str, Origin] = {}
    dropped: dict[str, str] = {}
    unnamed: list[str] = []
    for name in sorted(present):
        found = find(name)
        if found is None:
            unnamed.append(name)
            continue
        entry, values = found
        if isinstance(entry.rule, Drop):
            dropped[name] = entry.rule.reason
            continue
        sources = (name,) if len(entry.sources) == 1 else tuple(source.fill(values) for source in entry.sources)
        if absent := [source for source in sources if source not in present]:
            raise ModelError(f"{printable(name)} stands without {printable(absent[0])}, which it is joined with")
        for part, pattern in enumerate(entry.targets):
            target = pattern.fill(values)
            origin = Origin(entry.rule, sources, part)
            if origins.setdefault(target, origin) != origin:
                both = f"{printable(origins[target].sources[0])} and {printable(name)}"
                raise ModelError(f"{both} are both {printable(target)}: the file mixes two layouts")
    return Plan(origins, dropped, tuple(unnamed))


def invert(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The table read from right to left. What was dropped cannot come back."""
    return tuple(_inverse(rule) for rule in rules if not isinstance(rule, Drop))


def under(prefix: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The same table for names that carry `prefix` in front on the left side."""

    def put(rule: Rule) -> Rule:
        if isinstance(rule, Join):
            return replace(rule, sources=tuple(prefix + source for source in rule.sources))
        return replace(rule, source=prefix + rule.source)

    return tuple(put(rule) for rule in rules)


def prove(rules: Sequence[Rule], shapes: Mapping[str, Shape]) -> Plan:
    """The plan for a file of these shapes, if the table names all of it and leads back; else ModelError.

    Total: every name is spoken of. Injective: no two meet. Round trip: the inverse table gives each name and shape.
    """
    there = plan(rules, shapes)
    if there.unnamed:
        raise ModelError(f"no rule names {printable(there.unnamed[0])} (and {len(there.unnamed) - 1} more)")
    moved = {target: origin.shape(shapes) for target, origin in there.origins.items()}
    back = plan(invert(rules), moved)
    again = {name: origin.shape(moved) for name, origin in back.origins.items()}
    kept = {name: shape for name, shape in shapes.items() if name not in there.dropped}
    if odd := sorted(set(again.items()) ^ set(kept.items())) or back.unnamed:
        raise ModelError(f"the table does not lead back to {printable(str(odd[0]))}")
    return there


def _inverse(rule: Rename | Transpose | AsConv | AsLinear | Split | Join) -> Rule:
    match rule:
        case Split(source, targets):
            return Join(targets, source)
        case Join(sources, target):
            return Split(target, sources)
        case AsConv(source, target):
            return AsLinear(target, source)
        case AsLinear(source, target):
            return AsConv(target, source)
        case _:
            return replace(rule, source=rule.target, target=rule.source)


@dataclass(frozen=True)
class _Pattern:
    """A pattern cut at its first placeholder: a literal head, and the segments that follow."""

    head: str
    tail: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> _Pattern:
        head, brace, rest = text.partition("{")
        return cls(head, tuple((brace + rest).split(".")) if brace else ())

    def match(self, name: str) -> dict[str, str] | None:
        """What each placeholder stands for in `name`, which begins with the head; None if the rest differs."""
        if not self.tail:
            return {} if len(name) == len(self.head) else None
        segments = name[len(self.head) :].split(".")
        values: dict[str, str] = {}
        for index, wanted in enumerate(self.tail):
            if index >= len(segments):
                return None
            if wanted.endswith("*}"):
                values[wanted] = ".".join(segments[index:])
                return values
            if wanted.startswith("{"):
                values[wanted] = segments[index]
            elif wanted != segments[index]:
                return None
        return values if len(segments) == len(self.tail) else None

    def fill(self, values: Mapping[str, str]) -> str:
        return self.head + ".".join(values.get(segment, segment) for segment in self.tail)


@dataclass(frozen=True)
class _Entry:
    """A rule under one of its sources, its patterns parsed; `order` is its place in the table."""

    order: int
    pattern: _Pattern
    rule: Rule
    sources: tuple[_Pattern, ...]
    targets: tuple[_Pattern, ...]


def _finder(rules: Iterable[Rule]) -> Callable[[str], tuple[_Entry, dict[str, str]] | None]:
    """A function from a name to the first rule that matches it.

    Rules are kept by the literal head of their source, so that a name is compared with the few that begin like it.
    """
    table: dict[str, list[_Entry]] = {}
    for order, rule in enumerate(rules):
        sources = tuple(map(_Pattern.parse, rule.sources if isinstance(rule, Join) else (rule.source,)))
        texts = () if isinstance(rule, Drop) else rule.targets if isinstance(rule, Split) else (rule.target,)
        targets = tuple(map(_Pattern.parse, texts))
        for source in sources:
            table.setdefault(source.head, []).append(_Entry(order, source, rule, sources, targets))
    lengths = sorted({len(head) for head in table})

    def find(name: str) -> tuple[_Entry, dict[str, str]] | None:
        best: tuple[_Entry, dict[str, str]] | None = None
        for length in lengths:
            for entry in table.get(name[:length], ()) if length <= len(name) else ():
                if best is not None and best[0].order < entry.order:
                    break
                if (values := entry.pattern.match(name)) is not None:
                    best = entry, values
                    break
        return best

    return find

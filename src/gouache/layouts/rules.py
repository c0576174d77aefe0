"""Layouts as tables of rules; each rule maps one pattern of tensor names from one layout to another.

A pattern is a name in which `{i}` matches one dotted segment and `{rest*}` all remaining ones; the matched text is
inserted at the same placeholder on the other side. The first rule that matches a name is used, so an exception comes
before the general case. All rules except Join make views: nothing is copied, and mapped files stay mapped.
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
    """A matrix that is stored transposed: (a, b) -> (b, a)."""

    source: str
    target: str


@dataclass(frozen=True)
class AsConv:
    """A linear layer's matrix as a 1x1 convolution: (out, in) -> (out, in, 1, 1). A 1x1 convolution stays as it is."""

    source: str
    target: str


@dataclass(frozen=True)
class AsLinear:
    """A 1x1 convolution as a linear layer's matrix: (out, in, 1, 1) -> (out, in)."""

    source: str
    target: str


@dataclass(frozen=True)
class Split:
    """One tensor that contains several of equal size, concatenated along the first dimension."""

    source: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Join:
    """Several tensors, concatenated along the first dimension into one. The only rule that copies."""

    sources: tuple[str, ...]
    target: str


@dataclass(frozen=True)
class Drop:
    """A tensor that no network needs, with the reason."""

    source: str
    reason: str


Rule: TypeAlias = Rename | Transpose | AsConv | AsLinear | Split | Join | Drop


@dataclass(frozen=True)
class Origin:
    """How one tensor is made: read `sources`, apply `rule`; `part` is its index if the rule is a Split."""

    rule: Rule
    sources: tuple[str, ...]
    part: int = 0

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Its shape, from the shapes of its sources. Raises ModelError if the rule cannot be applied to them."""
        first = shapes[self.sources[0]]
        match self.rule:
            case Transpose() if len(first) == 2:
                return first[::-1]
            case AsConv() if len(first) == 2 or (len(first) == 4 and first[2:] == (1, 1)):
                return (*first[:2], 1, 1)
            case AsLinear() if len(first) == 4 and first[2:] == (1, 1):
                return first[:2]
            case Split(targets=targets) if first and first[0] % len(targets) == 0:
                return (first[0] // len(targets), *first[1:])
            case Join() if all(shapes[name] == first for name in self.sources) and first:
                return (first[0] * len(self.sources), *first[1:])
            case Rename():
                return first
        found = ", ".join(f"{printable(name)} {list(shapes[name])}" for name in self.sources)
        raise ModelError(f"cannot apply {type(self.rule).__name__} to {found}: the file mixes layouts or is damaged")

    def tensor(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor: a view of what `read` returns for its sources (for a Join, a copy)."""
        tensors = [read(name) for name in self.sources]
        self.shape({name: tuple(tensor.shape) for name, tensor in zip(self.sources, tensors)})
        match self.rule:
            case Transpose():
                return tensors[0].T
            case AsConv():
                return tensors[0] if tensors[0].ndim == 4 else tensors[0][..., None, None]
            case AsLinear():
                return tensors[0][..., 0, 0]
            case Split(targets=targets):
                return tensors[0].chunk(len(targets))[self.part]
            case Join():
                import torch  # only this rule needs it; listing a file must not wait for torch

                return torch.cat(tensors)
            case _:
                return tensors[0]


@dataclass(frozen=True)
class Plan:
    """A table applied to the names of one file: target name -> `Origin`.

    `dropped` maps names to the reason; `unnamed` are the names that no rule matches.
    """

    origins: Mapping[str, Origin]
    dropped: Mapping[str, str]
    unnamed: tuple[str, ...]


def plan(rules: Iterable[Rule], names: Iterable[str]) -> Plan:
    """Which tensor of the target layout is made from which of `names`.

    Raises ModelError if two names map to the same target, or if a source of a Join is missing.
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
            raise ModelError(f"{printable(name)} needs {printable(absent[0])}, which is missing")
        for part, pattern in enumerate(entry.targets):
            target = pattern.fill(values)
            origin = Origin(entry.rule, sources, part)
            if origins.setdefault(target, origin) != origin:
                both = f"{printable(origins[target].sources[0])} and {printable(name)}"
                raise ModelError(f"{both} both map to {printable(target)}: the file mixes two layouts")
    return Plan(origins, dropped, tuple(unnamed))


def invert(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The inverse table, from target to source names. Dropped tensors cannot be restored."""
    return tuple(_inverse(rule) for rule in rules if not isinstance(rule, Drop))


def under(prefix: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The same table with `prefix` before all source names."""

    def add_prefix(rule: Rule) -> Rule:
        if isinstance(rule, Join):
            return replace(rule, sources=tuple(prefix + source for source in rule.sources))
        return replace(rule, source=prefix + rule.source)

    return tuple(add_prefix(rule) for rule in rules)


def prove(rules: Sequence[Rule], shapes: Mapping[str, Shape]) -> Plan:
    """The plan for a file of these shapes. Raises ModelError if the table is not total, injective and invertible.

    Total: a rule matches every name. Injective: no two names map to one. Invertible: the inverse table restores each
    name and shape.
    """
    there = plan(rules, shapes)
    if there.unnamed:
        raise ModelError(f"no rule matches {printable(there.unnamed[0])} (and {len(there.unnamed) - 1} more)")
    moved = {target: origin.shape(shapes) for target, origin in there.origins.items()}
    back = plan(invert(rules), moved)
    restored = {name: origin.shape(moved) for name, origin in back.origins.items()}
    kept = {name: shape for name, shape in shapes.items() if name not in there.dropped}
    if different := sorted(set(restored.items()) ^ set(kept.items())) or back.unnamed:
        raise ModelError(f"the inverse table does not restore {printable(str(different[0]))}")
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
    """A pattern split at its first placeholder into a literal head and the segments after it."""

    head: str
    tail: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> _Pattern:
        head, brace, rest = text.partition("{")
        return cls(head, tuple((brace + rest).split(".")) if brace else ())

    def match(self, name: str) -> dict[str, str] | None:
        """The text that each placeholder matches in `name`, which begins with the head; None if the rest differs."""
        if not self.tail:
            return {} if len(name) == len(self.head) else None
        segments = name[len(self.head) :].split(".")
        values: dict[str, str] = {}
        for index, expected in enumerate(self.tail):
            if index >= len(segments):
                return None
            if expected.endswith("*}"):
                values[expected] = ".".join(segments[index:])
                return values
            if expected.startswith("{"):
                values[expected] = segments[index]
            elif expected != segments[index]:
                return None
        return values if len(segments) == len(self.tail) else None

    def fill(self, values: Mapping[str, str]) -> str:
        return self.head + ".".join(values.get(segment, segment) for segment in self.tail)


@dataclass(frozen=True)
class _Entry:
    """A rule, indexed by one of its sources, with parsed patterns; `order` is its position in the table."""

    order: int
    pattern: _Pattern
    rule: Rule
    sources: tuple[_Pattern, ...]
    targets: tuple[_Pattern, ...]


def _finder(rules: Iterable[Rule]) -> Callable[[str], tuple[_Entry, dict[str, str]] | None]:
    """A function that returns the first rule that matches a name, with the values of its placeholders.

    Rules are indexed by the literal head of their source, so a name is compared only with those of its prefixes.
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

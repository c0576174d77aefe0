"""What a file is, as a report that can be printed or handed on as JSON: `families.identify` with sizes and reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gouache.errors import printable
from gouache.families.found import Fact, Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile


@dataclass(frozen=True)
class Statement:
    """A fact under its name, in words."""

    name: str
    value: str
    sure: str
    evidence: str


@dataclass(frozen=True)
class Part:
    """A whole component: parameters counted, dtype as most of its tensors have it."""

    name: str
    parameters: int
    dtype: str
    layout: str
    evidence: str


@dataclass(frozen=True)
class Report:
    """`size` in bytes; `leftovers` maps each reason to the names it covers."""

    path: str
    format: str
    size: int
    count: int
    facts: tuple[Statement, ...]
    components: tuple[Part, ...]
    missing: Mapping[str, str]
    leftovers: Mapping[str, list[str]]
    unknown: tuple[str, ...]
    metadata: Mapping[str, str]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON can say it; `facts` by name."""
        values = asdict(self)
        values["facts"] = {each.pop("name"): each for each in values["facts"]}
        return values


def report(path: Path, *, prediction: str | None = None, family: str | None = None) -> Report:
    """Open `path` and say what it is. Raises FileError where it cannot be read."""
    file = open_model(path)
    found = identify(file, prediction=prediction, family=family)
    leftovers: dict[str, list[str]] = {}
    for name, reason in found.leftovers.items():
        leftovers.setdefault(reason, []).append(printable(name))
    return Report(
        path=printable(str(path)),
        format=file.format,
        size=file.nbytes,
        count=len(file),
        facts=tuple(_statements(found)),
        components=tuple(_parts(file, found)),
        missing={printable(name): printable(reason, 400) for name, reason in found.missing.items()},
        leftovers=leftovers,
        unknown=tuple(printable(name) for name in found.unknown),
        metadata={printable(key): printable(value) for key, value in file.metadata.items()},
        notes=tuple(printable(note, 400) for note in file.notes),
    )


def _statements(found: Found) -> list[Statement]:
    family = found.family.value
    facts: list[tuple[str, Fact[Any] | None, str]] = [
        ("kind", found.kind, str(found.kind.value)),
        ("family", found.family, family.name if family else "unknown"),
        ("variant", found.variant, str(found.variant.value or "-")),
    ]
    for name in ("prediction", "zero_snr", "latent_scale", "size", "ema"):
        fact = getattr(found, name)
        if fact is not None:
            facts.append((name, fact, _words(fact.value)))
    return [
        Statement(name, printable(value), fact.sure, printable(fact.evidence, 400))
        for name, fact, value in facts
        if fact
    ]


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parts(file: ModelFile, found: Found) -> list[Part]:
    parts = list[Part]()
    for each in found.components.values():
        sources = {source for origin in each.origins.values() for source in origin.sources}
        count = sum(math.prod(file.tensors[name].shape) for name in sources)
        parts.append(Part(each.name, count, each.dtype.value, each.layout, printable(each.evidence, 400)))
    return parts

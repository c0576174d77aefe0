"""The settings of a resumed run compared with those in its checkpoint: each difference is allowed or refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gouache.errors import printable
from gouache.outside import parse_json
from gouache.training.objective import Json


@dataclass(frozen=True)
class Change:
    """The value `name` was `before` up to `step`, and `after` from the next step on."""

    step: int
    name: str
    before: Json
    after: Json

    @property
    def setting(self) -> str:
        """`section.name`, without the keys of a dictionary within."""
        return ".".join(self.name.split(".")[:2])

    @property
    def text(self) -> str:
        return f"{self.name} {_text(self.before)} (now {_text(self.after)})"


def compare(
    section: str, step: int, before: Mapping[str, Json], after: Mapping[str, Json], defaults: Mapping[str, Json]
) -> list[Change]:
    """All values that differ, by name, as `section.name`.

    The values of a dictionary, or of the dictionaries in a list, are compared one by one: `section.name.key`. A name
    that `before` does not have is newer than the checkpoint: it had the effect of its default. A name that exists on
    one side only and has no default is None on the other.
    """
    before = {**{name: value for name, value in defaults.items() if name in after}, **before}
    there, here = _flat(section, before), _flat(section, after)
    return [
        Change(step, name, there.get(name), here.get(name))
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]


def refused(changes: Collection[Change], changeable: Collection[str]) -> list[Change]:
    """The changes whose settings, as `section.name`, are not among `changeable`."""
    return [change for change in changes if change.setting not in changeable]


def as_json(values: Mapping[str, Any]) -> dict[str, Json]:
    """`values` as they are after writing and reading JSON: tuples become lists. Raises TypeError for other types."""
    return parse_json(json.dumps(dict(values)))


def field_defaults(instance: object) -> dict[str, Json]:
    """The defaults of a dataclass's fields, as far as they are plain values."""
    if not dataclasses.is_dataclass(instance):
        return {}
    return {
        each.name: each.default
        for each in dataclasses.fields(instance)
        if each.default is None or isinstance(each.default, bool | int | float | str)
    }


def _flat(name: str, value: Any) -> dict[str, Json]:
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        value = {str(index): each for index, each in enumerate(value)}
    if not isinstance(value, Mapping):
        return {name: value}
    return {path: each for key, inner in value.items() for path, each in _flat(f"{name}.{key}", inner).items()}


def _text(value: Json) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value), 80) if value is not None else "not set"

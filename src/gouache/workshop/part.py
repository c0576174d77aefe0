"""Part: one folder of a diffusers model that is being made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gouache.layouts.rules import Origin, Rule


@dataclass(frozen=True)
class Part:
    """The folder `name`. `origins` lead from the names that its network carries to the source, `rules` from those names
    on to diffusers'; `config` is its config.json.
    """

    name: str
    origins: Mapping[str, Origin]
    rules: tuple[Rule, ...]
    config: Mapping[str, Any]

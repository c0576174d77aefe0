"""Part: one component of a model that is written as a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gouache.layouts.rules import Origin, Rule


@dataclass(frozen=True)
class Part:
    """The subfolder `name`. `origins` maps the network's names to tensors of the source, `rules` convert the network's
    names to diffusers'; `config` is its config.json.
    """

    name: str
    origins: Mapping[str, Origin]
    rules: tuple[Rule, ...]
    config: Mapping[str, Any]

"""PEFT's adapter configuration: alpha, and how OFT is computed, which its weight files do not contain.

It is read from `adapter_config.json` next to the file, or, in LoRAs saved by diffusers, from the header's metadata.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gouache.adapters.pattern import Pattern, Unsupported
from gouache.errors import FileError, ModelError
from gouache.files.record import ModelFile
from gouache.outside import MalformedText, parse_json, read_outside

METADATA_KEY = "lora_adapter_metadata"
CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True)
class Scales:
    """Configurations by the prefix of the module names they apply to; "" applies to all."""

    tables: Mapping[str, Mapping[str, Any]]
    _patterns: dict[str, Pattern | None] = field(default_factory=dict, repr=False, compare=False)

    def of(self, stem: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Additional parts ("scale" or "cayley_terms") of the module named `stem` in the file, which has `parts`.

        Empty if no configuration applies, or if `parts` already contain alpha or scale.
        """
        table = next((values for prefix, values in self.tables.items() if stem.startswith(prefix)), None)
        if table is None or {"alpha", "scale"} & set(parts):
            return {}
        if "oft_R.weight" in parts:
            terms = table.get("num_cayley_neumann_terms", 5) if table.get("use_cayley_neumann") else 0
            return {"cayley_terms": torch.tensor(float(terms if type(terms) is int and 0 <= terms < 100 else 0))}
        rank = next((parts[name].shape[0] for name in _RANK_PARTS if name in parts), None)
        if rank is None and any(name.startswith("lokr_") for name in parts):  # full factors: PEFT scales these too
            rank = self._matching(table.get("rank_pattern"), stem, table.get("r"))
        alpha = self._matching(table.get("alpha_pattern"), stem, table.get("lora_alpha", table.get("alpha")))
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            return {}
        scale = min(max(alpha, -_MAX_ALPHA), _MAX_ALPHA) / (rank**0.5 if table.get("use_rslora") else rank)
        return {"scale": torch.tensor(scale)} if math.isfinite(scale) else {}

    def _matching(self, patterns: Any, stem: str, default: Any) -> Any:
        """The value of the first key of `patterns`, regular expressions as in PEFT, that matches the end of `stem`.

        Raises ModelError if that takes too long.
        """
        for key, value in patterns.items() if isinstance(patterns, dict) else ():
            if key not in self._patterns:
                try:
                    self._patterns[key] = Pattern(key)
                except Unsupported:
                    self._patterns[key] = None
            pattern = self._patterns[key]
            if pattern is not None and pattern.ends(stem):
                return value
        if sum(pattern.work for pattern in self._patterns.values() if pattern is not None) > _MAX_WORK:
            raise ModelError("its adapter configuration has patterns that take too long to match")
        return default


_MAX_WORK = 10_000_000  # states; a few seconds
_MAX_CONFIG = 4_000_000  # bytes
_MAX_ALPHA = 1e30  # keeps alpha / rank within float32
_RANK_PARTS = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")


def scales(file: ModelFile) -> Scales:
    """The configuration of `file`, empty if it has none. Raises FileError if it cannot be parsed."""
    if METADATA_KEY in file.metadata:
        values = _parsed(file, file.metadata[METADATA_KEY], f"metadata {METADATA_KEY}")
        tables: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            component, _, option = key.partition(".")
            tables.setdefault(f"{component}.", {})[option] = value
        return Scales(tables)
    config_path = (file.path if file.path.is_dir() else file.path.parent) / CONFIG_NAME
    # In a folder of several LoRAs the config belongs to the file with PEFT's fixed name.
    if config_path.is_file() and (file.path.is_dir() or file.path.stem == "adapter_model"):
        text = read_outside(config_path, _MAX_CONFIG).decode("utf-8", "replace")
        return Scales({"": _parsed(file, text, CONFIG_NAME)})
    return Scales({})


def _parsed(file: ModelFile, text: str, where: str) -> dict[str, Any]:
    try:
        values = parse_json(text)
    except MalformedText as error:
        raise FileError(file.path, f"its adapter configuration ({where}) {error}") from None
    if not isinstance(values, dict):
        raise FileError(file.path, f"its adapter configuration ({where}) is not a JSON object of settings")
    return values

"""PEFT's adapter configuration: alpha, and how OFT is computed, which its weight files do not contain.

It is read from `adapter_config.json` next to the file, or, in LoRAs saved by diffusers, from the header's metadata.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gouache.errors import FileError
from gouache.files.record import ModelFile

METADATA_KEY = "lora_adapter_metadata"
CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True)
class Scales:
    """Configurations by the prefix of the module names they apply to; "" applies to all."""

    tables: Mapping[str, Mapping[str, Any]]

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
            rank = _matching(table.get("rank_pattern"), stem, table.get("r"))
        alpha = _matching(table.get("alpha_pattern"), stem, table.get("lora_alpha", table.get("alpha")))
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            return {}
        scale = min(max(alpha, -_MAX_ALPHA), _MAX_ALPHA) / (rank**0.5 if table.get("use_rslora") else rank)
        return {"scale": torch.tensor(scale)} if math.isfinite(scale) else {}


_MAX_ALPHA = 1e30  # keeps alpha / rank within float32
_RANK_PARTS = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")


def _matching(pattern: Any, stem: str, default: Any) -> Any:
    """The value of the first key of `pattern`, a regular expression as in PEFT, that matches the end of `stem`."""
    if isinstance(pattern, dict):
        for key, value in pattern.items():
            try:
                if re.match(rf"(.*\.)?({key})$", stem):
                    return value
            except re.error:
                continue
    return default


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
        return Scales({"": _parsed(file, config_path.read_text(encoding="utf-8", errors="replace"), CONFIG_NAME)})
    return Scales({})


def _parsed(file: ModelFile, text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise FileError(file.path, f"its adapter configuration ({where}) is not a JSON object of settings")
    return values

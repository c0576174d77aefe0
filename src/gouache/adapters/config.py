"""What PEFT says beside its weights rather than in them: alpha, and how its OFT is to be computed.

It stands in `adapter_config.json` beside the file, or, in LoRAs that diffusers saves, in the header's metadata.
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

HEADER = "lora_adapter_metadata"
BESIDE = "adapter_config.json"


@dataclass(frozen=True)
class Scales:
    """Configurations by what the names they are for begin with; "" for all."""

    tables: Mapping[str, Mapping[str, Any]]

    def of(self, stem: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Further parts of the module that the file calls `stem`, which has `parts`; none, if these say it all."""
        table = next((told for prefix, told in self.tables.items() if stem.startswith(prefix)), None)
        if table is None or {"alpha", "scale"} & set(parts):
            return {}
        if "oft_R.weight" in parts:
            terms = table.get("num_cayley_neumann_terms", 5) if table.get("use_cayley_neumann") else 0
            return {"cayley_terms": torch.tensor(float(terms if type(terms) is int and 0 <= terms < 100 else 0))}
        rank = next((parts[name].shape[0] for name in _RANKED if name in parts), None)
        if rank is None and any(name.startswith("lokr_") for name in parts):  # both factors whole: PEFT scales even so
            rank = _matching(table.get("rank_pattern"), stem, table.get("r"))
        alpha = _matching(table.get("alpha_pattern"), stem, table.get("lora_alpha", table.get("alpha")))
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            return {}
        scale = min(max(alpha, -_MOST), _MOST) / (rank**0.5 if table.get("use_rslora") else rank)
        return {"scale": torch.tensor(scale)} if math.isfinite(scale) else {}


_MOST = 1e30  # a larger alpha is no number that a float32 could hold
_RANKED = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")


def _matching(pattern: Any, stem: str, plain: Any) -> Any:
    """The value of the first key, a regular expression in PEFT's, at which `stem` ends."""
    if isinstance(pattern, dict):
        for key, value in pattern.items():
            try:
                if re.match(rf"(.*\.)?({key})$", stem):
                    return value
            except re.error:
                continue
    return plain


def scales(file: ModelFile) -> Scales:
    """The configuration that belongs to `file`; of no tables, if there is none. Raises FileError for a broken one."""
    if HEADER in file.metadata:
        told = _parsed(file, file.metadata[HEADER], "its metadata")
        tables: dict[str, dict[str, Any]] = {}
        for key, value in told.items():
            component, _, knob = key.partition(".")
            tables.setdefault(f"{component}.", {})[knob] = value
        return Scales(tables)
    beside = (file.path if file.path.is_dir() else file.path.parent) / BESIDE
    # Where several LoRAs lie together, a config is for the one that PEFT gives its one name.
    if beside.is_file() and (file.path.is_dir() or file.path.stem == "adapter_model"):
        return Scales({"": _parsed(file, beside.read_text(encoding="utf-8", errors="replace"), BESIDE)})
    return Scales({})


def _parsed(file: ModelFile, text: str, where: str) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise FileError(file.path, f"has a configuration ({where}) that is not JSON of settings")
    return told

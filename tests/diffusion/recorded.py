"""The results that scripts/record_k_diffusion.py stored."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parent / "data" / "k_diffusion.safetensors"


def recorded(prefix: str) -> dict[str, Tensor]:
    """The tensors of the case `prefix`, stored as `<prefix>/<name>`, by name; with "", those common to all cases."""
    if not prefix:
        return {key: tensor for key, tensor in load_file(DATA).items() if "/" not in key}
    return {
        key.removeprefix(prefix + "/"): tensor
        for key, tensor in load_file(DATA).items()
        if key.startswith(prefix + "/")
    }

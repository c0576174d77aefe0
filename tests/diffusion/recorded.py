"""What scripts/record_k_diffusion.py stored."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parent / "data" / "k_diffusion.safetensors"


def recorded(head: str) -> dict[str, Tensor]:
    """The tensors of one case, `<head>/<name>`, by name; with an empty head, those that all cases share."""
    if not head:
        return {key: tensor for key, tensor in load_file(DATA).items() if "/" not in key}
    return {
        key.removeprefix(head + "/"): tensor for key, tensor in load_file(DATA).items() if key.startswith(head + "/")
    }

"""LoRAs with random weights for a model, with kohya's or PEFT's names, written independently of Gouache's writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gouache import Model
from gouache.layouts.modules import Module, kohya_names, peft_names


def attention(module: Module) -> bool:
    """Whether trainers train this module by default: attention and feed-forward layers."""
    path = module[1]
    return any(part in path for part in (".attn1.", ".attn2.", ".ff.", ".self_attn.", ".mlp."))


def factors(model: Model, rank: int = 4, size: float = 0.2, seed: int = 0, convolutions: bool = False) -> dict[
    Module, tuple[Tensor, Tensor]
]:  # fmt: skip
    """{module: (up, down)} for the layers trained by default, and optionally for all convolutions."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for component, network in {"unet": model.unet, **model.text_encoders}.items():
        for path, layer in network.named_modules():
            module = (component, path)
            if isinstance(layer, nn.Linear) and attention(module):
                up, down = (layer.out_features, rank), (rank, layer.in_features)
            elif isinstance(layer, nn.Conv2d) and convolutions:
                up, down = (layer.out_channels, rank, 1, 1), (rank, layer.in_channels, *layer.kernel_size)
            else:
                continue
            found[module] = tuple(
                size * torch.randn(shape, generator=generator) / max(1, shape[1]) ** 0.5 for shape in (up, down)
            )
    return found


def save_kohya(
    path: Path, model: Model, parts: Mapping[Module, tuple[Tensor, Tensor]], alpha: float | None = 2.0,
    metadata: dict[str, str] | None = None,
) -> Path:  # fmt: skip
    names = kohya_names(model.specs, model.family.name == "sdxl")
    tensors = {}
    for module, (up, down) in parts.items():
        tensors |= {f"{names[module]}.lora_up.weight": up, f"{names[module]}.lora_down.weight": down}
        if alpha is not None:
            tensors[f"{names[module]}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return path


def save_peft(path: Path, model: Model, parts: Mapping[Module, tuple[Tensor, Tensor]]) -> Path:
    names = peft_names(model.specs)
    tensors = {}
    for module, (up, down) in parts.items():
        tensors |= {f"{names[module]}.lora_B.weight": up, f"{names[module]}.lora_A.weight": down}
    save_file(tensors, path)
    return path


def delta(pair: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """scale * up @ down in float64, shaped like the weight."""
    up, down = (part.double() for part in pair)
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])

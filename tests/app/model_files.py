"""Small model files for the library's tests."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file


def lora(path: Path, value: float = 0.0, **metadata: str) -> Path:
    """A LoRA of one module for SD1, in kohya's names; files with another `value` have another hash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    down, up = torch.full((4, 768), value), torch.zeros(320, 4)
    tensors = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up, f"{module}.alpha": torch.tensor(4.0)}
    save_file(tensors, path, {"ss_output_name": path.stem, **metadata})
    return path


def embedding(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"emb_params": torch.zeros(2, 768)}, path)
    return path

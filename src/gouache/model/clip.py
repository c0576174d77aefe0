"""A complete CLIP model, text and image towers: similarity of images and prompts (Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gouache.errors import ModelError
from gouache.families.shapes import text_config, text_spec, vision_spec
from gouache.files.assign import assign
from gouache.files.open import open_model
from gouache.nn.clip_text import ClipText
from gouache.nn.clip_vision import ClipVision
from gouache.prompts.tokenizer import Tokenizer

# Mean and standard deviation per channel of the images OpenAI's CLIP was trained on; OpenCLIP uses the same.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """Both towers, on the CPU in float32."""

    def __init__(self, text: ClipText, vision: ClipVision) -> None:
        self.text, self.vision = text.eval(), vision.eval()
        self._tokenizer = Tokenizer()

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, projection) of norm 1; prompts are truncated to 77 tokens."""
        rows = []
        for prompt in prompts:
            tokens = self._tokenizer.encode(prompt)[: self.text.spec.positions - 2]
            row = [self._tokenizer.begin, *tokens, self._tokenizer.end]
            rows.append(row + [self._tokenizer.end] * (self.text.spec.positions - len(row)))
        return F.normalize(self.text(torch.tensor(rows)).pooled, dim=-1)

    @torch.inference_mode()
    def encode_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings (B, projection) of norm 1."""
        images = torch.stack([_preprocess(picture, self.vision.spec.image_size) for picture in pictures])
        return F.normalize(self.vision(images).pooled, dim=-1)


def load(path: Path) -> Clip:
    """The CLIP model at `path`, a file or folder in Transformers names. Raises FileError, ModelError."""
    file = open_model(path)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    if not any(name.startswith("vision_model.") for name in shapes) or "text_projection.weight" not in shapes:
        raise ModelError(
            f"{path} is not a complete CLIP: expected text_model, vision_model, both projections, in Transformers names"
        )
    config = file.extra.get("config.json", {})
    texts, images = (config.get(f"{name}_config", {}) for name in ("text", "vision"))
    # OpenAI's towers use the quick GELU, OpenCLIP's the exact one; H and larger exist only from OpenCLIP.
    width = text_spec(shapes, "gelu").width
    activation = "quick_gelu" if width <= 768 else "gelu"
    text = ClipText(text_config(text_spec(shapes, activation), texts))
    vision_sizes = vision_spec(shapes)
    default_heads = vision_sizes.width // 64 if vision_sizes.width <= 1024 else vision_sizes.heads
    heads = int(images.get("num_attention_heads", default_heads))
    vision = ClipVision(replace(vision_sizes, heads=heads, activation=images.get("hidden_act", activation)))
    for tower, prefixes in ((text, ("text_",)), (vision, ("vision_", "visual_"))):
        tensors = {name: file.tensor(name) for name in file if name.startswith(prefixes) and "position_ids" not in name}
        assign(tower, tensors, dtype=torch.float32)
    return Clip(text, vision)


def _preprocess(picture: Image.Image, size: int) -> Tensor:
    """(3, size, size), as in CLIP's code: bicubic resize of the shorter side to `size`, centre crop, normalisation."""
    width, height = (size * side // min(picture.size) for side in picture.size)
    scaled = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(scaled.crop((left, top, left + size, top + size)), np.float32) / 255
    normal = (pixels - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
    return torch.from_numpy(normal).permute(2, 0, 1)

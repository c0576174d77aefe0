"""A whole CLIP, text and image towers: how well a picture fits its prompt (Hessel et al. 2021), and two pictures."""

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

# The mean and deviation of the pictures that OpenAI's CLIP was trained on; OpenCLIP kept them.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """Both towers, on the CPU in float32."""

    def __init__(self, text: ClipText, vision: ClipVision) -> None:
        self.text, self.vision = text.eval(), vision.eval()
        self._tokenizer = Tokenizer()

    @torch.inference_mode()
    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """(B, projection), of length 1; of a long prompt, what fits into 77 tokens."""
        rows = []
        for prompt in prompts:
            words = self._tokenizer.encode(prompt)[: self.text.spec.positions - 2]
            row = [self._tokenizer.begin, *words, self._tokenizer.end]
            rows.append(row + [self._tokenizer.end] * (self.text.spec.positions - len(row)))
        return F.normalize(self.text(torch.tensor(rows)).pooled, dim=-1)

    @torch.inference_mode()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(B, projection), of length 1."""
        images = torch.stack([_prepared(picture, self.vision.spec.image_size) for picture in pictures])
        return F.normalize(self.vision(images).pooled, dim=-1)


def load(path: Path) -> Clip:
    """The CLIP model at `path`, a file or folder in Transformers names. Raises FileError, ModelError."""
    file = open_model(path)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    if not any(name.startswith("vision_model.") for name in shapes) or "text_projection.weight" not in shapes:
        raise ModelError(
            f"{path} is no whole CLIP: it takes text_model, vision_model and both projections, in Transformers names"
        )
    config = file.extra.get("config.json", {})
    texts, images = (config.get(f"{name}_config", {}) for name in ("text", "vision"))
    # OpenAI's towers have the quick GELU, OpenCLIP's the exact one; H and larger were OpenCLIP's alone.
    width = text_spec(shapes, "gelu").width
    activation = "quick_gelu" if width <= 768 else "gelu"
    text = ClipText(text_config(text_spec(shapes, activation), texts))
    seen = vision_spec(shapes)
    openai = seen.width // 64 if seen.width <= 1024 else seen.heads
    heads = int(images.get("num_attention_heads", openai))
    vision = ClipVision(replace(seen, heads=heads, activation=images.get("hidden_act", activation)))
    for tower, starts in ((text, ("text_",)), (vision, ("vision_", "visual_"))):
        own = {name: file.tensor(name) for name in file if name.startswith(starts) and "position_ids" not in name}
        assign(tower, own, dtype=torch.float32)
    return Clip(text, vision)


def _prepared(picture: Image.Image, size: int) -> Tensor:
    """As CLIP's own code does: the shorter side to `size` by cubic interpolation, the middle cut out, normalised."""
    width, height = (size * side // min(picture.size) for side in picture.size)
    scaled = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(scaled.crop((left, top, left + size, top + size)), np.float32) / 255
    normal = (pixels - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
    return torch.from_numpy(normal).permute(2, 0, 1)

"""CLIP's image tower, with the names of Transformers; files spell `pre_layrnorm` like this."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gouache.nn.clip import Embedding, Encoder
from gouache.nn.spec import VisionSpec


@dataclass(frozen=True)
class VisionOutput:
    """`layers` as in `TextOutput`, (B, 1 + patches, width); `pooled` (B, projection or width) is the class token."""

    layers: tuple[Tensor, ...]
    pooled: Tensor


class Embeddings(nn.Module):
    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        patches = (spec.image_size // spec.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(spec.width))
        self.patch_embedding = nn.Conv2d(3, spec.width, spec.patch_size, stride=spec.patch_size, bias=False)
        self.position_embedding = Embedding(patches + 1, spec.width)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embedding(image).flatten(2).transpose(1, 2)  # B N D
        first = self.class_embedding.expand(len(image), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionModel(nn.Module):
    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.embeddings = Embeddings(spec)
        self.pre_layrnorm = nn.LayerNorm(spec.width)
        self.encoder = Encoder(spec.layers, spec.width, spec.heads, spec.mlp_width, spec.activation, causal=False)
        self.post_layernorm = nn.LayerNorm(spec.width)


class ClipVision(nn.Module):
    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.vision_model = VisionModel(spec)
        if spec.projection is not None:
            self.visual_projection = nn.Linear(spec.width, spec.projection, bias=False)

    def forward(self, image: Tensor) -> VisionOutput:
        """image (B, 3, size, size), normalised as in the tower's training."""
        tower = self.vision_model
        layers = tower.encoder(tower.pre_layrnorm(tower.embeddings(image)))
        pooled = tower.post_layernorm(layers[-1][:, 0])
        if self.spec.projection is not None:
            pooled = self.visual_projection(pooled)
        return VisionOutput(layers, pooled)

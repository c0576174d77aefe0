"""The text encoder's objective: a caption and its picture find each other in a batch (Radford et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.nn.clip_text import ClipText
from gouache.nn.clip_vision import ClipVision
from gouache.training.objective import Group, by_decay


@dataclass(frozen=True)
class Pairs:
    """`images` (B, 3, S, S) and the `tokens` (B, N) of their captions, begin and end tokens included."""

    images: Tensor
    tokens: Tensor


class Temperature(nn.Module):
    """The scale of the similarities, learnt as its logarithm and held below 100, as CLIP does."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self) -> Tensor:
        return self.logit_scale.clamp(max=math.log(100)).exp()


@dataclass(frozen=True)
class Contrast:
    text: ClipText
    vision: ClipVision
    temperature: Temperature = field(default_factory=Temperature)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"text": self.text, "vision": self.vision, "temperature": self.temperature}

    def groups(self) -> list[Group]:
        return by_decay(self.networks)

    def losses(self, batch: Pairs, step: int) -> Mapping[str, Tensor]:
        return self.matched(self.text(batch.tokens).pooled, batch.images)

    def matched(self, said: Tensor, images: Tensor) -> Mapping[str, Tensor]:
        """Losses of captions, by their pooled states (B, projection), and their images (B, 3, S, S)."""
        similarity = self.temperature() * self.similarities(said, images)
        right = torch.arange(len(similarity), device=similarity.device)
        loss = 0.5 * (F.cross_entropy(similarity, right) + F.cross_entropy(similarity.T, right))
        found = (similarity.argmax(1) == right).float().mean()
        return {"loss": loss, "found": found}

    def similarities(self, said: Tensor, images: Tensor) -> Tensor:
        """Cosines (B, B): rows are captions, columns pictures."""
        seen = F.normalize(self.vision(images).pooled, dim=-1)
        return F.normalize(said, dim=-1) @ seen.T

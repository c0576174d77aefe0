"""The text encoder's objective: match captions and images within a batch, as CLIP does (Radford et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.nn.clip_text import ClipText
from gouache.nn.clip_vision import ClipVision
from gouache.training.objective import Group, Json, by_decay


@dataclass(frozen=True)
class Pairs:
    """`images` (B, 3, S, S) and the `tokens` (B, N) of their captions, including start and end tokens."""

    images: Tensor
    tokens: Tensor


class Temperature(nn.Module):
    """The scale of the similarities. As in CLIP, its logarithm is learned and its value is at most 100."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self) -> Tensor:
        return self.logit_scale.clamp(max=math.log(100)).exp()


@dataclass(frozen=True)
class Contrast:
    """The symmetric cross-entropy of caption-image similarities; it uses no random numbers.

    `groups` are the trained parameters, by default all trainable ones. `data` identifies the data set and `base` the
    weights of frozen parameters; both are compared on resume.
    """

    text: ClipText
    vision: ClipVision
    temperature: Temperature = field(default_factory=Temperature)
    groups: tuple[Group, ...] = ()
    data: str | None = None
    base: str | None = None

    changeable: ClassVar[frozenset[str]] = frozenset()

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"text": self.text, "vision": self.vision, "temperature": self.temperature}

    def parameter_groups(self) -> list[Group]:
        return list(self.groups) or by_decay(self.networks)

    def config(self) -> Mapping[str, Json]:
        return {"type": "contrast", "data": self.data, "base": self.base}

    def losses(self, batch: Pairs, step: int) -> Mapping[str, Tensor]:
        return self.feature_losses(self.text(batch.tokens).pooled, batch.images)

    def feature_losses(self, text_features: Tensor, images: Tensor) -> Mapping[str, Tensor]:
        """Losses of captions, given as pooled text features (B, projection), and their images (B, 3, S, S).

        "accuracy" is the share of captions whose most similar image is their own.
        """
        logits = self.temperature() * self.similarities(text_features, images)
        labels = torch.arange(len(logits), device=logits.device)
        loss = 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels))
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"loss": loss, "accuracy": accuracy}

    def similarities(self, text_features: Tensor, images: Tensor) -> Tensor:
        """Cosine similarities (B, B): rows are captions, columns images."""
        image_features = F.normalize(self.vision(images).pooled, dim=-1)
        return F.normalize(text_features, dim=-1) @ image_features.T

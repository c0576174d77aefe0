"""The text tower's second lesson: besides which picture a caption means, what stands where in it.

Through one linear layer, the mean of a caption's states is to tell the things' latents, where they cover the ground,
and its colour; put together, the picture, as far as words can tell. So what a small U-Net would be slow to work out
from words (which shape, in which colours, over what) the text tower says in a form that the U-Net need only lay out.
The layer itself is where the U-Net starts (`layout_start`), and no part of the model file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from gouache.nn.clip_text import ClipText
from gouache.training.contrastive import Contrast, Pairs
from gouache.training.objective import Group, by_decay


@dataclass(frozen=True)
class Laid(Pairs):
    """Pairs, and the pictures' `latents` (B, 4, h, w), of about unit variance, where layouts are to be learnt."""

    latents: Tensor | None = None


class Layout(nn.Linear):
    """States (B, N, width) to latents (B, 4, side, side): of their mean, things over a ground of one colour."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__(width, 5 * side * side + 4)
        self.side = side

    def forward(self, states: Tensor) -> Tensor:
        flat, ground = super().forward(states.mean(1)).split((5 * self.side**2, 4), dim=1)
        things, cover = flat.unflatten(1, (5, self.side, self.side)).split((4, 1), dim=1)
        return things + (1 - cover) * ground[:, :, None, None]


@dataclass(frozen=True)
class Telling:
    """Contrast, and `weight` times the squared error of the layout, for batches that have latents."""

    contrast: Contrast
    layout: Layout
    weight: float = 2.0

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {**self.contrast.networks, "layout": self.layout}

    def groups(self) -> list[Group]:
        return by_decay(self.networks)

    def losses(self, batch: Laid, step: int) -> Mapping[str, Tensor]:
        said = self.contrast.text(batch.tokens)
        losses = dict(self.contrast.matched(said.pooled, batch.images))
        if batch.latents is not None:
            losses["layout"] = F.mse_loss(self.layout(said.last), batch.latents)
            losses["loss"] = losses["loss"] + self.weight * losses["layout"]
        return losses


@dataclass(frozen=True)
class Spelling:
    """The layout alone."""

    text: ClipText
    layout: Layout

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"text": self.text, "layout": self.layout}

    def groups(self) -> list[Group]:
        return by_decay(self.networks)

    def losses(self, batch: Laid, step: int) -> Mapping[str, Tensor]:
        assert batch.latents is not None
        return {"loss": F.mse_loss(self.layout(self.text(batch.tokens).last), batch.latents)}

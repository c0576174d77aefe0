"""Layout tokens: the text encoder predicts, from the caption, what is where in the picture.

A caption is padded to 77 tokens, and tokens behind its end attend to all of it. Sixteen of those padding tokens, the
layout, are trained to predict one patch of 4x4 latent cells each: the latents of the things (premultiplied by alpha),
their alpha, and the background's latents. Composited, they are the latent picture, as far as a caption determines it. A
small U-Net would be slow to learn from words which shape, in which colours, belongs where; given this, it only needs to
look up its own patch (`init_unet_layout`) and learns to turn it into a picture. `LayoutHead`, which decodes the tokens
here, is not part of the model file.

A prompt longer than thirty words occupies the tokens of the first patches, which shows in the picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gouache.nn.clip_text import ClipText
from gouache.training.contrastive import Contrast
from gouache.training.objective import Group, Json, by_decay

FIRST = 32  # index of the first layout token
SIDE = 4  # patches along a side
CELLS = 4  # cells along the side of a patch
PATCHES = SIDE * SIDE
END = FIRST + PATCHES  # tokens from here on cannot influence the layout: attention is causal
FOREGROUND = 5  # channels: four latents of things (times alpha), and alpha


@dataclass(frozen=True)
class CaptionedLatents:
    """Captions' `tokens` (B, N), N >= `END`, and their pictures' `latents` (B, 4, 16, 16), of about unit variance.

    `images` (B, 3, S, S) are given for contrastive batches only.
    """

    tokens: Tensor
    latents: Tensor
    images: Tensor | None = None


def patch_codes() -> Tensor:
    """(PATCHES, 4): the position of a patch as four bits of -1 or 1.

    In order: right patch of its pair, lower patch of its pair, right half, lower half.
    """
    number = torch.arange(PATCHES)
    y, x = number // SIDE, number % SIDE
    return torch.stack([x % 2, y % 2, x // 2, y // 2], 1) * 2.0 - 1


class LayoutHead(nn.Module):
    """Decodes the latent picture from the text encoder's states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The attributes' names are keys of saved weights.
        self.draw = nn.Linear(width, FOREGROUND * CELLS * CELLS + 4)
        self.place = nn.Linear(width, patch_codes().shape[1], bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """States (B, N, width) to latents (B, 4, 16, 16): things over a background of one colour per patch."""
        foreground, background = self.draw(states[:, FIRST:END]).split((FOREGROUND * CELLS * CELLS, 4), dim=2)
        things, alpha = foreground.unflatten(2, (FOREGROUND, CELLS, CELLS)).split((4, 1), dim=2)
        patches = things + (1 - alpha) * background[..., None, None]  # B P 4 y x
        rows = patches.unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 4, 2, 5)
        return rows.flatten(4, 5).flatten(2, 3)

    def position_loss(self, states: Tensor) -> Tensor:
        """Mean squared error of the position codes: a layout token's is its patch's, every other token's is zero."""
        target = states.new_zeros(states.shape[1], patch_codes().shape[1])
        target[FIRST:END] = patch_codes()
        return (self.place(states) - target).pow(2).mean()


@dataclass(frozen=True)
class LayoutObjective:
    """The layout's weighted squared error, its position loss, and the contrastive loss for batches with images.

    `channel_weights` (4,) weighs the errors of the latent channels.
    """

    contrast: Contrast
    layout: LayoutHead
    channel_weights: Tensor
    autocast: bool = False

    changeable: ClassVar[frozenset[str]] = frozenset()

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        others = {"vision": self.contrast.vision, "temperature": self.contrast.temperature, "layout": self.layout}
        return {"text_encoder": self.text, **others}

    @property
    def text(self) -> ClipText:
        return self.contrast.text

    def parameter_groups(self) -> list[Group]:
        return by_decay(self.networks)

    def config(self) -> Mapping[str, Json]:
        # Six digits: the last bits of the weights, which are measured on pictures, may depend on the processor.
        weights = [float(f"{weight:.6g}") for weight in self.channel_weights.tolist()]
        return {"type": "layout", "channel_weights": weights, "autocast": self.autocast, "base": None}

    def losses(self, batch: CaptionedLatents, step: int) -> Mapping[str, Tensor]:
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=self.autocast):
            encoded = self.text(batch.tokens)
        states = encoded.last.float()
        errors = (self.layout(states) - batch.latents).pow(2).mean((0, 2, 3))
        losses = {"layout": (self.channel_weights * errors).mean(), "position": self.layout.position_loss(states)}
        losses["loss"] = losses["layout"] + 0.3 * losses["position"]
        if batch.images is not None:
            contrast = self.contrast.feature_losses(encoded.pooled.float(), batch.images)
            losses["contrast"], losses["accuracy"] = contrast["loss"], contrast["accuracy"]
            losses["loss"] = losses["loss"] + 0.2 * losses["contrast"]
        return losses

"""What the text tower says besides which picture a caption means: what lies where in it, on a canvas of its own.

A caption is padded to 77 tokens, and what stands behind its end hears all of it. So sixteen of those tokens, one for
each patch of 4x4 cells of the latent picture, are to tell their patch: the things' latents, where they cover the
ground, and the ground's colour; put together, the picture, as far as words can tell. A small U-Net would be slow to
work out from words which shape, in which colours, stands where; told it like this, it need only look up its own patch
(`canvas_start`), and learns to make a picture of it. The layers that read the canvas here stay out of the model file.

A prompt longer than thirty words writes over the first patches, and its picture shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gouache.nn.clip_text import ClipText
from gouache.training.contrastive import Contrast
from gouache.training.objective import Group, by_decay

FIRST = 32  # the canvas' first token, counted from 0
SIDE = 4  # patches along a side
CELLS = 4  # cells along the side of a patch
PATCHES = SIDE * SIDE
END = FIRST + PATCHES  # what follows cannot change what the canvas says
DRAWN = 5  # four latents of things, and how far they cover the ground


@dataclass(frozen=True)
class Laid:
    """Captions' `tokens` (B, N), N at least `END`, and their pictures' `latents` (B, 4, 16, 16), of about unit
    variance; the `images` (B, 3, S, S) where captions are to be told apart by them.
    """

    tokens: Tensor
    latents: Tensor
    images: Tensor | None = None


def codes() -> Tensor:
    """(PATCHES, 4): where a patch lies, as plus and minus 1: right or left of its pair, lower or upper, right or left
    half, lower or upper half.
    """
    number = torch.arange(PATCHES)
    y, x = number // SIDE, number % SIDE
    return torch.stack([x % 2, y % 2, x // 2, y // 2], 1) * 2.0 - 1


class Canvas(nn.Module):
    """Reads the picture off the text tower's states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.draw = nn.Linear(width, DRAWN * CELLS * CELLS + 4)
        self.place = nn.Linear(width, codes().shape[1], bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """States (B, N, width) to latents (B, 4, 16, 16): things over a ground of one colour a patch."""
        drawn, ground = self.draw(states[:, FIRST:END]).split((DRAWN * CELLS * CELLS, 4), dim=2)
        things, cover = drawn.unflatten(2, (DRAWN, CELLS, CELLS)).split((4, 1), dim=2)
        patches = things + (1 - cover) * ground[..., None, None]  # B P 4 y x
        rows = patches.unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 4, 2, 5)
        return rows.flatten(4, 5).flatten(2, 3)

    def misplaced(self, states: Tensor) -> Tensor:
        """How far tokens are from telling which patch they are, and the others from telling that they are none."""
        wanted = states.new_zeros(states.shape[1], codes().shape[1])
        wanted[FIRST:END] = codes()
        return (self.place(states) - wanted).pow(2).mean()


@dataclass(frozen=True)
class Telling:
    """The canvas' squared error, weighted, and the contrast of captions and pictures for batches that have images."""

    contrast: Contrast
    canvas: Canvas
    counts: Tensor  # (4,): how much the errors of each latent count
    autocast: bool = False

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {**self.contrast.networks, "canvas": self.canvas}

    @property
    def text(self) -> ClipText:
        return self.contrast.text

    def groups(self) -> list[Group]:
        return by_decay(self.networks)

    def losses(self, batch: Laid, step: int) -> Mapping[str, Tensor]:
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=self.autocast):
            said = self.text(batch.tokens)
        states = said.last.float()
        errors = (self.canvas(states) - batch.latents).pow(2).mean((0, 2, 3))
        losses = {"canvas": (self.counts * errors).mean(), "place": self.canvas.misplaced(states)}
        losses["loss"] = losses["canvas"] + 0.3 * losses["place"]
        if batch.images is not None:
            matched = self.contrast.matched(said.pooled.float(), batch.images)
            losses["contrast"], losses["found"] = matched["loss"], matched["found"]
            losses["loss"] = losses["loss"] + 0.2 * losses["contrast"]
        return losses

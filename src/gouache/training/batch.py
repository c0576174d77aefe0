"""A batch of training examples: what the data gives to an objective."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gouache.diffusion.conditioning import Conditioning
from gouache.prompts.encode import Sizes


@dataclass(frozen=True)
class Batch:
    """B examples of one size.

    `latents` (B, C, h, w) are scaled to about unit variance. `conditioning` has B rows; None if the captions must be
    encoded now because a text encoder or an embedding is trained: then `captions` and `sizes` (for families that use
    them) have B entries, and `concat` (B, E, h, w) the further input channels of an inpainting model. `weights` (B,)
    multiply the losses; None means 1. `mask` (B, 1, h, w), 0 to 1, limits the loss to a part of each picture.
    `regularization` (B,) marks examples of the class. `names` name the pictures in messages, `contents` are hashes.
    """

    latents: Tensor
    conditioning: Conditioning | None = None
    captions: tuple[str, ...] = ()
    sizes: tuple[Sizes, ...] = ()
    concat: Tensor | None = None
    weights: Tensor | None = None
    mask: Tensor | None = None
    regularization: Tensor | None = None
    names: tuple[str, ...] = ()
    contents: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.latents)

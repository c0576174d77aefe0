"""Batch latents for the U-Net, computed in blocks of some thousand and each used several times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gouache.diffusion.conditioning import Conditioning
from gouache.training.batch import Batch
from gouache.training.objective import step_generator


class LatentCache:
    """Batches of captioned latents by number: `SCENES` are computed at a time, and each is used `REPEATS` times.

    Rendering a scene and encoding its caption takes a third of the U-Net's time for a training step on it, so a scene
    comes again soon, with other noise. A batch is a function of its number alone: it takes scenes of its block, in an
    order of its pass over the block.
    """

    SCENES = 8192
    REPEATS = 3

    def __init__(self, captioned: Callable[[int, int], Batch], batch: int, seed: int) -> None:
        """`captioned(first, count)` computes scenes number `first` to `first + count - 1`."""
        self.captioned, self.batch, self.seed = captioned, batch, seed
        self._number = -1
        self._block: tuple[Tensor, Tensor] | None = None

    def __call__(self, number: int) -> Batch:
        batches_per_pass = self.SCENES // self.batch
        block, within = divmod(number, self.REPEATS * batches_per_pass)
        if block != self._number:
            self._block = None  # free the old block's memory before the new one is allocated
            self._block, self._number = self._compute(block), block
        repeat, index = divmod(within, batches_per_pass)
        order = torch.randperm(self.SCENES, generator=step_generator(self.seed, block * self.REPEATS + repeat))
        rows = order[index * self.batch : (index + 1) * self.batch]
        assert self._block is not None
        latents, contexts = self._block
        return Batch(latents[rows], Conditioning(contexts[rows].float()))

    def _compute(self, block: int) -> tuple[Tensor, Tensor]:
        parts = [self.captioned(block * self.SCENES + first, 64) for first in range(0, self.SCENES, 64)]
        return torch.cat([part.latents for part in parts]), torch.cat(
            [part.conditioning.context.bfloat16() for part in parts]
        )

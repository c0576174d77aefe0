"""Captioned latents for the U-Net, made by the thousand and met more than once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gouache.diffusion.conditioning import Conditioning
from gouache.training.denoising import Captioned
from gouache.training.objective import chance


class Pool:
    """Captioned latents by number, in batches: some thousand are made at a time, and each of them comes `AGAIN` times.

    Rendering a scene and reading its caption cost a third of what the U-Net learns from it, so a scene is met again
    soon, under other noise. A batch is a function of its number alone: of its pool's scenes, in an order of their own.
    """

    SCENES = 8192
    AGAIN = 3

    def __init__(self, captioned: Callable[[int, int], Captioned], batch: int, seed: int) -> None:
        self.captioned, self.batch, self.seed = captioned, batch, seed
        self._number, self._held = -1, None

    def __call__(self, number: int) -> Captioned:
        a_pass = self.SCENES // self.batch
        pool, within = divmod(number, self.AGAIN * a_pass)
        if pool != self._number:
            self._held = None  # the old one's memory goes before the new one's comes
            self._held, self._number = self._made(pool), pool
        again, index = divmod(within, a_pass)
        order = torch.randperm(self.SCENES, generator=chance(self.seed, pool * self.AGAIN + again))
        rows = order[index * self.batch : (index + 1) * self.batch]
        latents, contexts = self._held
        return Captioned(latents[rows], Conditioning(contexts[rows].float()))

    def _made(self, pool: int) -> tuple[Tensor, Tensor]:
        parts = [self.captioned(pool * self.SCENES + first, 64) for first in range(0, self.SCENES, 64)]
        return torch.cat([part.latents for part in parts]), torch.cat([part.said.context.bfloat16() for part in parts])

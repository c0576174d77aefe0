"""What an inpainting network receives beside the noisy latent: a mask, and the picture without what is masked."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS = 9  # of such a network: the latent, the mask, the latent of the masked picture


def concat_channels(encode: Callable[[Tensor], Tensor], pictures: Tensor, masks: Tensor) -> Tensor:
    """pictures (B, 3, H, W) in [-1, 1], masks (B, 1, H, W), 0 to 1 -> (B, 1 + C, h, w): mask, masked latent.

    What is masked, from 0.5 on, is mid-grey before `encode` makes latents of it.
    """
    kept = encode(pictures * (masks < 0.5))
    small = F.interpolate(masks, size=kept.shape[2:], mode="nearest").to(kept)
    return torch.cat([small, kept], dim=1)

"""A perceptual distance without trained weights: of the features of a fixed random convolutional network.

It is LPIPS (Zhang et al. 2018) with random filters instead of trained ones: local patterns are compared rather than
pixels, so that a blur is punished where a pixel loss prefers it. Random filters do worse than trained ones and need no
file (compared in section 4.1 of that paper).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WIDTHS = (32, 64, 128)  # channels of each layer; all but the first halve the picture
_SEED = 0


class RandomFeatures(nn.Module):
    """Convolutions with filters that are the same in every run, He-initialised; they are never trained."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(_SEED)
        for number, (before, width) in enumerate(zip((3, *_WIDTHS), _WIDTHS)):
            deviation = (2 / (9 * before)) ** 0.5
            filters = deviation * torch.randn(width, before, 3, 3, generator=generator)
            self.register_buffer(f"filters_{number}", filters)

    def forward(self, image: Tensor) -> list[Tensor]:
        """image (B, 3, H, W) -> features of each layer (B, C, H', W'), of norm 1 over the channels."""
        features, x = [], image
        for number in range(len(_WIDTHS)):
            x = F.relu(F.conv2d(x, self.get_buffer(f"filters_{number}").to(x), stride=2 if number else 1, padding=1))
            features.append(F.normalize(x, dim=1, eps=1e-6))
        return features

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """The mean over layers and positions of the squared distance of the features, 0 to 2; both (B, 3, H, W)."""
        each = [(x - y).pow(2).sum(1).mean() for x, y in zip(self(a), self(b), strict=True)]
        return torch.stack(each).mean()

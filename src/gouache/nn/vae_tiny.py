"""TAESD (Bohan 2023): an autoencoder with about 1 % of the computation, for previews and slow machines.

Names are those of diffusers' files. Its latents are scaled as for the U-Net, so no latent scale is applied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.errors import ModelError
from gouache.nn.spec import TinyVaeSpec
from gouache.nn.vae import Moments

BLOCKS = (1, 3, 3, 3)  # residual blocks per level of the encoder; the decoder has the reverse


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class NumberedLayers(nn.Module):
    """Layers that run one after the other, with the names of files: `layers.0`, `layers.1`, ..."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TinyAutoencoder(nn.Module):
    """Pictures in [-1, 1] to scaled latents and back; encoder or decoder may be absent."""

    def __init__(self, spec: TinyVaeSpec) -> None:
        super().__init__()
        self.spec = spec
        if spec.encoder:
            self.encoder = NumberedLayers(_encoder(spec))
        if spec.decoder:
            self.decoder = NumberedLayers(_decoder(spec))

    def encode(self, image: Tensor) -> Moments:
        """image (B, 3, H, W) in [-1, 1] -> Moments (B, C, H/8, W/8) with practically no variance.

        Raises ModelError if there is no encoder.
        """
        if not self.spec.encoder:
            raise ModelError(
                "this TAESD has only a decoder and cannot encode pictures; use a complete TAESD or another VAE"
            )
        latent = self.encoder((image + 1) / 2)
        return Moments(latent, torch.full_like(latent, -30.0))

    def decode(self, latent: Tensor) -> Tensor:
        """latent (B, C, h, w), scaled -> image (B, 3, 8h, 8w), approximately in [-1, 1], not clamped."""
        return self.decoder(torch.tanh(latent / 3) * 3) * 2 - 1


def _encoder(spec: TinyVaeSpec) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for level, count in enumerate(BLOCKS):
        first = nn.Conv2d(3, spec.channels, 3, padding=1)
        downsample = nn.Conv2d(spec.channels, spec.channels, 3, padding=1, stride=2, bias=False)
        layers += [downsample if level else first, *(Block(spec.channels) for _ in range(count))]
    return [*layers, nn.Conv2d(spec.channels, spec.latent_channels, 3, padding=1)]


def _decoder(spec: TinyVaeSpec) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(spec.latent_channels, spec.channels, 3, padding=1), nn.ReLU()]
    for count in reversed(BLOCKS[1:]):
        layers += [Block(spec.channels) for _ in range(count)]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(spec.channels, spec.channels, 3, padding=1, bias=False)]
    layers += [Block(spec.channels) for _ in range(BLOCKS[0])]
    return [*layers, nn.Conv2d(spec.channels, 3, 3, padding=1)]

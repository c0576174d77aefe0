"""The KL autoencoder of Stable Diffusion 1, 2 and XL, with its original names.

Rombach et al. 2022; names of CompVis' `ldm/modules/diffusionmodules/model.py`. All norms have eps 1e-6 here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.nn.attention import attention
from gouache.nn.spec import VaeSpec


@dataclass(frozen=True)
class Moments:
    """The Gaussian that an encoder predicts per latent value: `mean` and `logvar`, both (B, C, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """A sample of this Gaussian (B, C, h, w); `noise` is standard normal, of the same shape."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, in nats per image: (B,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)
        else:
            self.nin_shortcut = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Self-attention over all positions, with one head over all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # B HW C
        h = attention(q, k, v, heads=1).transpose(1, 2).unflatten(2, x.shape[-2:])  # B C H W
        return x + self.proj_out(h)


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Halves height and width. Like the original, it pads on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, and the downsampling or upsampling after them, if any."""

    def __init__(self, channels: int, out_channels: int, blocks: int, *, down: bool = False, up: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(channels if index == 0 else out_channels, out_channels) for index in range(blocks)
        )
        self.downsample = Downsample(out_channels) if down else None
        self.upsample = Upsample(out_channels) if up else None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.block:
            x = layer(x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


class Encoder(nn.Module):
    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        widths = [spec.channels * mult for mult in spec.channel_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(spec.image_channels, spec.channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(before, width, spec.res_blocks, down=index < last)
            for index, (before, width) in enumerate(zip([spec.channels, *widths], widths))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * spec.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        widths = [spec.channels * mult for mult in spec.channel_mult]
        self.conv_in = nn.Conv2d(spec.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        # Numbered by resolution like the encoder's levels: up.0 has the highest resolution and runs last.
        self.up = nn.ModuleList(
            Level(before, width, spec.res_blocks + 1, up=index > 0)
            for index, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], spec.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """Pictures in [-1, 1] to latents and back. Latents here are unscaled: the caller applies the latent scale."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        self.quant_conv = nn.Conv2d(2 * spec.latent_channels, 2 * spec.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(spec.latent_channels, spec.latent_channels, 1)

    def encode(self, image: Tensor) -> Moments:
        """image (B, 3, H, W) in [-1, 1], H and W multiples of `spec.factor` -> Moments (B, C, H/f, W/f)."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return Moments(mean, torch.clamp(logvar, -30.0, 20.0))

    def decode(self, latent: Tensor) -> Tensor:
        """latent (B, C, h, w) -> image (B, 3, f*h, f*w), approximately in [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latent))

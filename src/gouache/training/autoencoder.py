"""The autoencoder's objective: pictures that come back as they went in, through latents near the standard normal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.nn.vae import Autoencoder
from gouache.training.objective import Group, by_decay, chance

SCALES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Pictures:
    """`images` (B, 3, H, W) in [-1, 1]. Where `latents` (B, C, h, w) are given, only the decoder is trained."""

    images: Tensor
    latents: Tensor | None = None


@dataclass(frozen=True)
class Reconstruction:
    """Differences at several scales and of edges, and the divergence of the latents, weighted by `kl`.

    A plain pixel loss leaves absolute colour to the last, because group norms hide it: the coarse scales bring it.
    `autocast` computes in bfloat16 where that is faster. `own_groups` replaces the usual parameter groups.
    """

    vae: Autoencoder
    seed: int
    kl: float = 1e-6
    autocast: bool = False
    own_groups: tuple[Group, ...] = ()

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"vae": self.vae}

    def groups(self) -> list[Group]:
        return list(self.own_groups) or by_decay(self.networks)

    def losses(self, batch: Pictures, step: int) -> Mapping[str, Tensor]:
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self.autocast):
            if batch.latents is None:
                moments = self.vae.encode(batch.images)
                noise = torch.randn(moments.mean.shape, generator=chance(self.seed, step))
                latents = moments.sample(noise.to(moments.mean))
                kl = moments.kl().mean()
            else:
                latents, kl = batch.latents, torch.zeros(())
            back = self.vae.decode(latents).float()
        scales, edges = pyramid(back, batch.images), edge_difference(back, batch.images)
        return {"loss": scales + edges + self.kl * kl, "scales": scales, "edges": edges, "kl": kl}


def pyramid(a: Tensor, b: Tensor) -> Tensor:
    """The mean absolute difference at full size and at each coarser scale, added up."""
    difference = a - b
    return torch.stack([F.avg_pool2d(difference, scale).abs().mean() for scale in SCALES]).sum()


def edge_difference(a: Tensor, b: Tensor) -> Tensor:
    """How far neighbouring pixels differ differently: a blurred edge costs what a pixel loss forgives."""
    difference = a - b
    across = difference[..., :, 1:] - difference[..., :, :-1]
    along = difference[..., 1:, :] - difference[..., :-1, :]
    return across.abs().mean() + along.abs().mean()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal to noise in dB, an image each: (B,). Both in [-1, 1]; `a` is clamped first, as a picture would be."""
    error = ((a.clamp(-1, 1) - b) / 2).pow(2).flatten(1).mean(1)
    return -10 * error.clamp_min(1e-10).log10()

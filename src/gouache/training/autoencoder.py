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
    """Differences at several scales, of edges and of structure, and the divergence of the latents, weighted by `kl`.

    A plain pixel loss leaves absolute colour to the last, because group norms hide it: the coarse scales bring it.
    `structure` weighs the perceptual term, which holds small patterns of little contrast as dear as loud ones.
    `autocast` computes in bfloat16 where that is faster. `own_groups` replaces the usual parameter groups.
    """

    vae: Autoencoder
    seed: int
    kl: float = 1e-6
    structure: float = 0.1
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
        unlike = 1 - similarity(back, batch.images).mean()
        loss = scales + edges + self.structure * unlike + self.kl * kl
        return {"loss": loss, "scales": scales, "edges": edges, "structure": unlike, "kl": kl}


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


WINDOW = 7  # pixels, along each side


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of every square window, channel by channel; both in [-1, 1].

    1 where windows are the same. Windows weigh their pixels alike, and variances are of samples.
    """
    pixels = WINDOW**2
    mean_a, mean_b, aa, bb, ab = (F.avg_pool2d(x, WINDOW, 1) for x in (a, b, a * a, b * b, a * b))
    unbiased = pixels / (pixels - 1)
    spread = unbiased * (aa + bb - mean_a**2 - mean_b**2)
    together = unbiased * (ab - mean_a * mean_b)
    calm_means, calm_spreads = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # of a range of 2
    bright = (2 * mean_a * mean_b + calm_means) / (mean_a**2 + mean_b**2 + calm_means)
    return bright * (2 * together + calm_spreads) / (spread + calm_spreads)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal to noise in dB, an image each: (B,). Both in [-1, 1]; `a` is clamped first, as a picture would be."""
    error = ((a.clamp(-1, 1) - b) / 2).pow(2).flatten(1).mean(1)
    return -10 * error.clamp_min(1e-10).log10()

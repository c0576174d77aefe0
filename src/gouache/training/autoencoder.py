"""The autoencoder's objective: reconstruct images from latents that are close to a standard normal distribution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.nn.vae import Autoencoder
from gouache.training.objective import Group, Json, by_decay, step_generator

SCALES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Pictures:
    """`images` (B, 3, H, W) in [-1, 1]. If `latents` (B, C, h, w) are given, only the decoder is trained."""

    images: Tensor
    latents: Tensor | None = None


@dataclass(frozen=True)
class Reconstruction:
    """The sum of differences at several scales, of edges, of structure (weight `structure`), and of KL (weight `kl`).

    With a plain pixel loss absolute colour is learned last, because group norms remove it: the coarse scales correct
    that. The structure term (SSIM) gives small patterns of low contrast the same weight as those of high contrast.
    `autocast` computes in bfloat16 where that is faster. `groups` are the trained parameters, by default all trainable
    ones. `data` identifies the data set and `base` the weights of frozen parameters; both are compared on resume.
    """

    vae: Autoencoder
    seed: int
    kl: float = 1e-6
    structure: float = 0.1
    autocast: bool = False
    groups: tuple[Group, ...] = ()
    data: str | None = None
    base: str | None = None

    changeable: ClassVar[frozenset[str]] = frozenset()

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"vae": self.vae}

    def parameter_groups(self) -> list[Group]:
        return list(self.groups) or by_decay(self.networks)

    def config(self) -> Mapping[str, Json]:
        return {
            "type": "reconstruction",
            "kl": self.kl,
            "structure": self.structure,
            "autocast": self.autocast,
            "seed": self.seed,
            "data": self.data,
            "base": self.base,
        }

    def losses(self, batch: Pictures, step: int) -> Mapping[str, Tensor]:
        decoded, kl = self.decoded(batch, step_generator(self.seed, step))
        return self.terms(decoded, batch.images, kl)

    def decoded(self, batch: Pictures, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """The pictures decoded from sampled latents, or with `generator` None from their means, and the mean KL."""
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self.autocast):
            if batch.latents is None:
                moments = self.vae.encode(batch.images)
                latents = moments.mean
                if generator is not None:
                    latents = moments.sample(torch.randn(latents.shape, generator=generator).to(latents))
                kl = moments.kl().mean()
            else:
                latents, kl = batch.latents, torch.zeros((), device=batch.latents.device)
            return self.vae.decode(latents).float(), kl

    def terms(self, decoded: Tensor, images: Tensor, kl: Tensor) -> dict[str, Tensor]:
        """The losses of `decoded` pictures; "loss" is their weighted sum."""
        scales, edges = pyramid(decoded, images), edge_difference(decoded, images)
        structure = 1 - ssim(decoded, images).mean()
        loss = scales + edges + self.structure * structure + self.kl * kl
        return {"loss": loss, "scales": scales, "edges": edges, "structure": structure, "kl": kl}


def pyramid(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the mean absolute differences at full size and at each coarser scale of `SCALES`."""
    difference = a - b
    return torch.stack([F.avg_pool2d(difference, scale).abs().mean() for scale in SCALES]).sum()


def edge_difference(a: Tensor, b: Tensor) -> Tensor:
    """The mean absolute difference of the gradients between neighbouring pixels: it penalises blurred edges."""
    difference = a - b
    across = difference[..., :, 1:] - difference[..., :, :-1]
    along = difference[..., 1:, :] - difference[..., :-1, :]
    return across.abs().mean() + along.abs().mean()


WINDOW = 7  # pixels, along each side


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of every square window, per channel; both in [-1, 1].

    1 where windows are equal. All pixels of a window have the same weight; variances are sample variances.
    """
    pixels = WINDOW**2
    mean_a, mean_b, aa, bb, ab = (F.avg_pool2d(x, WINDOW, 1) for x in (a, b, a * a, b * b, a * b))
    unbiased = pixels / (pixels - 1)
    variances = unbiased * (aa + bb - mean_a**2 - mean_b**2)
    covariance = unbiased * (ab - mean_a * mean_b)
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # for a range of 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance * (2 * covariance + c2) / (variances + c2)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per image: (B,). Both in [-1, 1]; `a` is clamped first, as a saved image is."""
    error = ((a.clamp(-1, 1) - b) / 2).pow(2).flatten(1).mean(1)
    return -10 * error.clamp_min(1e-10).log10()

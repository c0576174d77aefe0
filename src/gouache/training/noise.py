"""The noise of a training step: standard normal, or changed so that it also has coarse parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class NoiseOptions:
    """How the noise differs from white noise. All are off by default.

    `offset`: a constant per picture and channel is added, normal with this deviation, so that the mean brightness is
    learned too; 0.05 to 0.1 is usual. `offset_adaptive` times the absolute mean of each latent channel is added to that
    deviation. `pyramid_iterations`: noise of that many coarser and coarser sizes is added, each weaker by the factor
    `pyramid_discount`, then the sum is scaled to deviation 1; 6 to 10 and 0.3 are usual. `perturbation`: the network's
    input has noise with this deviation that its target does not have (Ning et al. 2023); 0.1 is usual. With
    `offset_random` and `perturbation_random` each picture has a random share of that strength.
    """

    offset: float = 0.0
    offset_adaptive: float = 0.0
    offset_random: bool = False
    pyramid_iterations: int = 0
    pyramid_discount: float = 0.3
    perturbation: float = 0.0
    perturbation_random: bool = False


WHITE = NoiseOptions()


def sample_noise(latents: Tensor, options: NoiseOptions, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(noise of the target, noise of the input) for latents (B, C, h, w), both shaped like them, float32 on the CPU.

    White noise is the first that is drawn: options change what is added to it, not the noise itself.
    """
    latents = latents.detach().to("cpu", torch.float32)
    count, channels = latents.shape[:2]
    noise = torch.randn(latents.shape, generator=generator)
    if options.offset or options.offset_adaptive:
        strength = _strength(options.offset, options.offset_random, count, generator)
        strength = (strength + options.offset_adaptive * latents.mean((2, 3), keepdim=True).abs()).clamp_min(0)
        noise = noise + strength * torch.randn(count, channels, 1, 1, generator=generator)
    if options.pyramid_iterations:
        noise = _pyramid(noise, options.pyramid_iterations, options.pyramid_discount, generator)
    if not options.perturbation:
        return noise, noise
    strength = _strength(options.perturbation, options.perturbation_random, count, generator)
    return noise, noise + strength * torch.randn(latents.shape, generator=generator)


def _strength(most: float, random: bool, count: int, generator: torch.Generator) -> Tensor:
    """(B, 1, 1, 1) or a scalar."""
    return most * torch.rand(count, 1, 1, 1, generator=generator) if random else torch.tensor(most)


def _pyramid(noise: Tensor, iterations: int, discount: float, generator: torch.Generator) -> Tensor:
    """As kohya's multires noise: level i is smaller by r^i, r in [2, 4) drawn anew, and weighted by discount^i.

    Each picture is scaled by its own deviation, so that it does not depend on the others of its batch.
    """
    height, width = noise.shape[2:]
    for level in range(iterations):
        ratio = (2 + 2 * float(torch.rand((), generator=generator))) ** level
        size = max(1, int(height / ratio)), max(1, int(width / ratio))
        coarse = torch.randn(*noise.shape[:2], *size, generator=generator)
        noise = noise + discount**level * F.interpolate(coarse, (height, width), mode="bilinear")
        if 1 in size:
            break
    return noise / noise.std((1, 2, 3), keepdim=True)

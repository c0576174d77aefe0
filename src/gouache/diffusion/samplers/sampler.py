"""What a sampler is: a function, with its history in local variables and its noise handed to it.

    sampler(denoise, x, sigmas, *, noise, on_step=None) -> x

`x` is (B, C, H, W) in the variance-exploding scale, x0 + sigma * n. `sigmas` is a float32 vector on the CPU, falling,
usually ending in 0; a run of n steps has n + 1 of them. The last value may be above 0 (DDIM and PLMS stop at the
model's lowest noise level, as their authors do).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x, sigma) -> the picture x0 that the model sees in x. sigma is a scalar tensor, or one value an image (B,)."""


class NoiseSource(Protocol):
    """Where a sampler's randomness comes from; `diffusion.noise.Noise` is the one implementation."""

    def draw(self) -> Tensor:
        """The next standard normal sample, shaped like x; each image draws from its own generator."""
        ...

    def between(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """The Brownian increment from sigma to sigma_next, scaled to unit variance, shaped like x.

        One path an image: the same two levels give the same noise whatever was asked before.
        """
        ...


@dataclass(frozen=True)
class Step:
    """Told to `on_step` after each step: its index from 0, how many there are, sigma, x after it and the x0 seen."""

    index: int
    count: int
    sigma: float
    x: Tensor
    denoised: Tensor


OnStep = Callable[[Step], None]


class Sampler(Protocol):
    def __call__(
        self, denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: NoiseSource, on_step: OnStep | None = None
    ) -> Tensor: ...


def report(on_step: OnStep | None, index: int, sigmas: Tensor, x: Tensor, denoised: Tensor) -> None:
    """Tell `on_step`, if there is one, that step `index` of the run over `sigmas` is done."""
    if on_step is not None:
        on_step(Step(index, len(sigmas) - 1, float(sigmas[index]), x, denoised))


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """The derivative dx/dsigma of the probability-flow ODE (Karras et al. 2022, eq. 1)."""
    return (x - denoised) / sigma


def ancestral_step(sigma: Tensor, sigma_next: Tensor, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """(sigma_down, sigma_up): how far to step down, and how much fresh noise brings the level back to sigma_next."""
    if eta == 0:
        return sigma_next, torch.zeros_like(sigma_next)
    up = eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2).clamp_min(0).sqrt()
    up = torch.minimum(sigma_next, up)
    return (sigma_next**2 - up**2).clamp_min(0).sqrt(), up


def churned(
    x: Tensor,
    sigma: Tensor,
    steps: int,
    noise: NoiseSource,
    *,
    s_churn: float,
    s_tmin: float,
    s_tmax: float,
    s_noise: float,
) -> tuple[Tensor, Tensor]:
    """(x, sigma) with the level raised by fresh noise first: the stochasticity of Karras et al. 2022, algorithm 2.

    `s_churn` is how much, spread over the steps; it acts where s_tmin <= sigma <= s_tmax. Once it is on, noise is
    drawn at every step, used or not, as k-diffusion does: a seed then means the same picture.
    """
    if s_churn == 0:
        return x, sigma
    fresh = noise.draw() * s_noise
    if not s_tmin <= sigma <= s_tmax:
        return x, sigma
    raised = sigma * (1 + min(s_churn / steps, 2**0.5 - 1))
    return x + fresh * (raised**2 - sigma**2).sqrt(), raised

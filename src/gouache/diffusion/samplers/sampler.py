"""The interface of samplers: functions that receive their noise as an argument and keep history in local variables.

    sampler(denoise, x, sigmas, *, noise, on_step=None) -> x

`x` is (B, C, H, W) in variance-exploding scale, x0 + sigma * n. `sigmas` is a decreasing float32 vector on the CPU that
usually ends in 0; a run of n steps has n + 1 of them. The last value may be above 0 (DDIM and PLMS stop at the model's
lowest noise level, as in their papers' code).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x, sigma) -> the x0 prediction, shaped like x. sigma is a scalar tensor, or one value per image (B,)."""


class NoiseSource(Protocol):
    """The source of a sampler's noise; `diffusion.noise.Noise` is the only implementation."""

    def draw(self) -> Tensor:
        """The next standard normal noise, shaped like x; each image has its own generator."""
        ...

    def between(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """The Brownian increment from sigma to sigma_next, scaled to unit variance, shaped like x.

        Each image has its own path: the same two levels give the same noise, independent of earlier calls.
        """
        ...


@dataclass(frozen=True)
class Step:
    """The argument of `on_step` after each step: index from 0, number of steps, sigma, new x, x0 prediction."""

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
    """Call `on_step`, if given, after step `index` of the run over `sigmas`."""
    if on_step is not None:
        on_step(Step(index, len(sigmas) - 1, float(sigmas[index]), x, denoised))


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """The derivative dx/dsigma of the probability-flow ODE (Karras et al. 2022, eq. 1)."""
    return (x - denoised) / sigma


def ancestral_step(sigma: Tensor, sigma_next: Tensor, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """(sigma_down, sigma_up): the level to step down to, and the noise to add there to reach sigma_next."""
    if eta == 0:
        return sigma_next, torch.zeros_like(sigma_next)
    sigma_up = eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2).clamp_min(0).sqrt()
    sigma_up = torch.minimum(sigma_next, sigma_up)
    return (sigma_next**2 - sigma_up**2).clamp_min(0).sqrt(), sigma_up


def add_churn(
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
    """(x, sigma) after noise has been added to raise the level: the stochasticity of Karras et al. 2022, algorithm 2.

    `s_churn` is the total amount over all steps; it applies where s_tmin <= sigma <= s_tmax. If it is not 0, noise is
    generated at every step, used or not, as in k-diffusion, so that equal seeds give equal images.
    """
    if s_churn == 0:
        return x, sigma
    added = noise.draw() * s_noise
    if not s_tmin <= sigma <= s_tmax:
        return x, sigma
    sigma_hat = sigma * (1 + min(s_churn / steps, 2**0.5 - 1))
    return x + added * (sigma_hat**2 - sigma**2).sqrt(), sigma_hat

"""DPM-Solver-2 in k-diffusion's form: a half step to the geometric mean, then a whole step with the slope there.

After Lu et al. 2022 (DPM-Solver) and Karras et al. 2022, algorithm 2. Second order, two evaluations per step.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from gouache.diffusion.samplers.sampler import (
    Denoise,
    NoiseSource,
    OnStep,
    add_churn,
    ancestral_step,
    report,
    to_d,
)


def dpm2(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Deterministic unless `s_churn` raises the level before each step."""
    churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, sigma_hat = add_churn(x, sigma, len(sigmas) - 1, noise, **churn)
        denoised = denoise(x, sigma_hat)
        x = _midpoint_step(denoise, x, sigma_hat, sigma_next, denoised)
        report(on_step, index, sigmas, x, denoised)
    return x


def dpm2_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """The same step to sigma_down, then added noise to reach the next level."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        x = _midpoint_step(denoise, x, sigma, sigma_down, denoised)
        if sigma_up > 0:
            x = x + noise.draw() * (s_noise * sigma_up)
        report(on_step, index, sigmas, x, denoised)
    return x


def _midpoint_step(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, denoised: Tensor) -> Tensor:
    """x at sigma_next. The step to 0, where the geometric mean is 0, is Euler's."""
    slope = to_d(x, sigma, denoised)
    if sigma_next > 0:
        sigma_mid = (sigma * sigma_next).sqrt()
        x_mid = x + slope * (sigma_mid - sigma)
        slope = to_d(x_mid, sigma_mid, denoise(x_mid, sigma_mid))
    return x + slope * (sigma_next - sigma)

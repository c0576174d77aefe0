"""DPM-Solver-2 in k-diffusion's form: a half step to the geometric middle, then a whole step with its slope.

After Lu et al. 2022 (DPM-Solver) and Karras et al. 2022, algorithm 2. Second order, two evaluations a step.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from gouache.diffusion.samplers.sampler import (
    Denoise,
    NoiseSource,
    OnStep,
    ancestral_step,
    churned,
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
        x, raised = churned(x, sigma, len(sigmas) - 1, noise, **churn)
        denoised = denoise(x, raised)
        x = _midpoint_step(denoise, x, raised, sigma_next, denoised)
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
    """The same step to a lower level, then fresh noise back up."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        down, up = ancestral_step(sigma, sigma_next, eta)
        x = _midpoint_step(denoise, x, sigma, down, denoised)
        if up > 0:
            x = x + noise.draw() * (s_noise * up)
        report(on_step, index, sigmas, x, denoised)
    return x


def _midpoint_step(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, denoised: Tensor) -> Tensor:
    """x at sigma_next; the step to 0 has no geometric middle and is Euler's."""
    slope = to_d(x, sigma, denoised)
    if sigma_next > 0:
        middle = (sigma * sigma_next).sqrt()
        x_middle = x + slope * (middle - sigma)
        slope = to_d(x_middle, middle, denoise(x_middle, middle))
    return x + slope * (sigma_next - sigma)

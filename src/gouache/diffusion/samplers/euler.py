"""Euler's and Heun's method on the probability-flow ODE (Karras et al. 2022, algorithms 1 and 2), and ancestral."""

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


def euler(
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
    """First order, one evaluation a step."""
    churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, raised = churned(x, sigma, len(sigmas) - 1, noise, **churn)
        denoised = denoise(x, raised)
        x = x + to_d(x, raised, denoised) * (sigma_next - raised)
        report(on_step, index, sigmas, x, denoised)
    return x


def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Euler's step to a lower level, then fresh noise back up; at eta 0 it is `euler`."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        down, up = ancestral_step(sigma, sigma_next, eta)
        x = x + to_d(x, sigma, denoised) * (down - sigma)
        if up > 0:
            x = x + noise.draw() * (s_noise * up)
        report(on_step, index, sigmas, x, denoised)
    return x


def heun(
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
    """Second order: the mean of the slopes at both ends, two evaluations a step; Euler's step to 0."""
    churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, raised = churned(x, sigma, len(sigmas) - 1, noise, **churn)
        denoised = denoise(x, raised)
        slope = to_d(x, raised, denoised)
        if sigma_next > 0:
            x_end = x + slope * (sigma_next - raised)
            slope = (slope + to_d(x_end, sigma_next, denoise(x_end, sigma_next))) / 2
        x = x + slope * (sigma_next - raised)
        report(on_step, index, sigmas, x, denoised)
    return x

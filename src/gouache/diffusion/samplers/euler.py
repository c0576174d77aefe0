"""Euler, Euler ancestral and Heun on the probability-flow ODE (Karras et al. 2022, algorithms 1 and 2)."""

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
    """First order, one evaluation per step."""
    churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, sigma_hat = add_churn(x, sigma, len(sigmas) - 1, noise, **churn)
        denoised = denoise(x, sigma_hat)
        x = x + to_d(x, sigma_hat, denoised) * (sigma_next - sigma_hat)
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
    """Euler's step to sigma_down, then added noise to reach the next level; at eta 0 it equals `euler`."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        x = x + to_d(x, sigma, denoised) * (sigma_down - sigma)
        if sigma_up > 0:
            x = x + noise.draw() * (s_noise * sigma_up)
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
    """Second order: the mean of the slopes at both ends, two evaluations per step; the step to 0 is Euler's."""
    churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, sigma_hat = add_churn(x, sigma, len(sigmas) - 1, noise, **churn)
        denoised = denoise(x, sigma_hat)
        slope = to_d(x, sigma_hat, denoised)
        if sigma_next > 0:
            x_end = x + slope * (sigma_next - sigma_hat)
            slope = (slope + to_d(x_end, sigma_next, denoise(x_end, sigma_next))) / 2
        x = x + slope * (sigma_next - sigma_hat)
        report(on_step, index, sigmas, x, denoised)
    return x

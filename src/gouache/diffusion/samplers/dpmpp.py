"""DPM-Solver++ (Lu et al. 2022), deterministic and stochastic, in k-diffusion's variants.

All are exponential integrators in lambda = -ln sigma: over a step of length h = ln(sigma / sigma_next) the linear part
is solved exactly, which interpolates from x towards an estimate of x0, leaving the fraction sigma_next / sigma of the
distance. They differ in the estimate: the current x0 prediction, that of a half step, or the linear or quadratic
extrapolation of previous ones.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import Tensor

from gouache.diffusion.samplers.sampler import Denoise, NoiseSource, OnStep, ancestral_step, report


def dpmpp_2s_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """2S: second order with a half step, two evaluations per step; then added noise."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        estimate = denoised
        if sigma_down > 0:
            sigma_mid = (sigma * sigma_down).sqrt()
            estimate = denoise(_interpolate(denoised, x, sigma_mid / sigma), sigma_mid)
        x = _interpolate(estimate, x, sigma_down / sigma)
        if sigma_up > 0:
            x = x + noise.draw() * (s_noise * sigma_up)
        report(on_step, index, sigmas, x, denoised)
    return x


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """2M: second order by linear extrapolation of the last two x0 predictions; one evaluation per step."""
    previous = None  # x0 prediction of the previous step
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        estimate = denoised
        if previous is not None and sigma_next > 0:
            ratio = (sigma / sigma_next).log() / (sigmas[index - 1] / sigma).log()  # relative step length
            estimate = denoised + ratio / 2 * (denoised - previous)
        x = _interpolate(estimate, x, sigma_next / sigma)
        previous = denoised
        report(on_step, index, sigmas, x, denoised)
    return x


def dpmpp_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Tensor:
    """SDE: a step of the fraction `r` in lambda, then the whole step, on one Brownian path: two evaluations."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        estimate = denoised
        if sigma_next > 0:
            sigma_mid = sigma ** (1 - r) * sigma_next**r
            sigma_down, sigma_up = ancestral_step(sigma, sigma_mid, eta)
            x_mid = _interpolate(denoised, x, sigma_down / sigma)
            if sigma_up > 0:
                x_mid = x_mid + noise.between(sigma, sigma_mid) * (s_noise * sigma_up)
            estimate = denoised + (denoise(x_mid, sigma_mid) - denoised) / (2 * r)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        x = _interpolate(estimate, x, sigma_down / sigma)
        if sigma_up > 0:
            x = x + noise.between(sigma, sigma_next) * (s_noise * sigma_up)
        report(on_step, index, sigmas, x, denoised)
    return x


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: Literal["midpoint", "heun"] = "midpoint",
) -> Tensor:
    """2M SDE: 2M for the stochastic equation; `solver_type` sets the weight of the slope."""
    previous = None
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            h = (sigma / sigma_next).log()
            length = h * (1 + eta)
            x = _interpolate(denoised, x, (-length).exp())
            if previous is not None:
                slope = (denoised - previous) * (h / (sigmas[index - 1] / sigma).log())
                fraction = -(-length).expm1()
                x = x + slope * (fraction / 2 if solver_type == "midpoint" else 1 - fraction / length)
            x = x + _sde_noise(noise, sigma, sigma_next, h, eta, s_noise)
        previous = denoised
        report(on_step, index, sigmas, x, denoised)
    return x


def dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """3M SDE: quadratic extrapolation of the last three x0 predictions; the first two steps use one and two.

    As in the authors' code, and so in every tool, the quadratic term has half the weight that its integral requires.
    The method is therefore of second order, with a small constant. It is kept so that seeds give the known images.
    """
    predictions: list[Tensor] = []  # newest first
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        predictions = [denoised, *predictions[:2]]
        if sigma_next == 0:
            x = denoised
        else:
            h = (sigma / sigma_next).log()
            length = h * (1 + eta)
            phi_2 = (-length).expm1() / length + 1
            phi_3 = phi_2 / length - 0.5
            x = _interpolate(denoised, x, (-length).exp())
            if len(predictions) == 2:
                x = x + phi_2 * (predictions[0] - predictions[1]) * (h / (sigmas[index - 1] / sigma).log())
            elif len(predictions) == 3:
                last = (sigmas[index - 1] / sigma).log() / h  # lengths of the two previous steps, relative to this one
                last_but_one = (sigmas[index - 2] / sigmas[index - 1]).log() / h
                slope = (predictions[0] - predictions[1]) / last
                previous_slope = (predictions[1] - predictions[2]) / last_but_one
                curvature = (slope - previous_slope) / (last + last_but_one)
                x = x + phi_2 * (slope + curvature * last) - phi_3 * curvature
            x = x + _sde_noise(noise, sigma, sigma_next, h, eta, s_noise)
        report(on_step, index, sigmas, x, denoised)
    return x


def _interpolate(x0: Tensor, x: Tensor, remaining: Tensor) -> Tensor:
    """Linear interpolation that keeps the fraction `remaining` of the distance from `x0` to x; at 0 it is `x0`."""
    return x0 + remaining * (x - x0)


def _sde_noise(
    noise: NoiseSource, sigma: Tensor, sigma_next: Tensor, h: Tensor, eta: float, s_noise: float
) -> Tensor | float:
    """The noise that the stochastic equation adds over a step of length h, at level sigma_next; 0 at eta 0."""
    if eta == 0:
        return 0.0
    return noise.between(sigma, sigma_next) * (s_noise * sigma_next * (-(-2 * eta * h).expm1()).sqrt())

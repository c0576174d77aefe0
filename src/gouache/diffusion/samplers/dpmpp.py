"""DPM-Solver++ (Lu et al. 2022), deterministic and stochastic, in k-diffusion's variants.

All are exponential integrators in lambda = -ln sigma: over a step of length h = ln(sigma / sigma_next) the linear part
is solved exactly, which moves x towards a picture x0 until the share sigma_next / sigma of the way is left. They
differ in the picture: the one just seen, one from a half step, or a line or parabola through those seen before.
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
    """2S: second order by a half step, two evaluations a step; then fresh noise."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        down, up = ancestral_step(sigma, sigma_next, eta)
        seen = denoised
        if down > 0:
            middle = (sigma * down).sqrt()
            seen = denoise(_towards(denoised, x, middle / sigma), middle)
        x = _towards(seen, x, down / sigma)
        if up > 0:
            x = x + noise.draw() * (s_noise * up)
        report(on_step, index, sigmas, x, denoised)
    return x


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """2M: second order by a line through the last two pictures; one evaluation a step."""
    before = None
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        seen = denoised
        if before is not None and sigma_next > 0:
            share = (sigma / sigma_next).log() / (sigmas[index - 1] / sigma).log()  # this step in lengths of the last
            seen = denoised + share / 2 * (denoised - before)
        x = _towards(seen, x, sigma_next / sigma)
        before = denoised
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
    """SDE: a step of share `r` in lambda, then the whole one, both along one Brownian path; two evaluations a step."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        seen = denoised
        if sigma_next > 0:
            middle = sigma ** (1 - r) * sigma_next**r
            down, up = ancestral_step(sigma, middle, eta)
            x_middle = _towards(denoised, x, down / sigma)
            if up > 0:
                x_middle = x_middle + noise.between(sigma, middle) * (s_noise * up)
            seen = denoised + (denoise(x_middle, middle) - denoised) / (2 * r)
        down, up = ancestral_step(sigma, sigma_next, eta)
        x = _towards(seen, x, down / sigma)
        if up > 0:
            x = x + noise.between(sigma, sigma_next) * (s_noise * up)
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
    """2M SDE: as 2M, for the stochastic equation; `solver_type` is how the line's slope is weighed."""
    before = None
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            h = (sigma / sigma_next).log()
            length = h * (1 + eta)
            x = _towards(denoised, x, (-length).exp())
            if before is not None:
                slope = (denoised - before) * (h / (sigmas[index - 1] / sigma).log())
                gone = -(-length).expm1()
                x = x + slope * (gone / 2 if solver_type == "midpoint" else 1 - gone / length)
            x = x + _fresh(noise, sigma, sigma_next, h, eta, s_noise)
        before = denoised
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
    """3M SDE: a parabola through the last three pictures; its first steps have only one and two.

    As in DPM-Solver++'s own code, and so in every tool, the parabola's bend counts half of what its integral asks for.
    That makes the method one of second order with a small constant; it stays, for the pictures are known by it.
    """
    seen: list[Tensor] = []
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        seen = [denoised, *seen[:2]]
        if sigma_next == 0:
            x = denoised
        else:
            h = (sigma / sigma_next).log()
            length = h * (1 + eta)
            phi_2 = (-length).expm1() / length + 1
            phi_3 = phi_2 / length - 0.5
            x = _towards(denoised, x, (-length).exp())
            if len(seen) == 2:
                x = x + phi_2 * (seen[0] - seen[1]) * (h / (sigmas[index - 1] / sigma).log())
            elif len(seen) == 3:
                last = (sigmas[index - 1] / sigma).log() / h  # lengths of the two steps before, in this one's
                last_but_one = (sigmas[index - 2] / sigmas[index - 1]).log() / h
                slope, slope_before = (seen[0] - seen[1]) / last, (seen[1] - seen[2]) / last_but_one
                bend = (slope - slope_before) / (last + last_but_one)
                x = x + phi_2 * (slope + bend * last) - phi_3 * bend
            x = x + _fresh(noise, sigma, sigma_next, h, eta, s_noise)
        report(on_step, index, sigmas, x, denoised)
    return x


def _towards(picture: Tensor, x: Tensor, share_left: Tensor) -> Tensor:
    """x moved towards `picture` until `share_left` of the way is left; at 0 it is the picture."""
    return picture + share_left * (x - picture)


def _fresh(
    noise: NoiseSource, sigma: Tensor, sigma_next: Tensor, h: Tensor, eta: float, s_noise: float
) -> Tensor | float:
    """What the stochastic equation adds over a step of length h, at level sigma_next; nothing at eta 0."""
    if eta == 0:
        return 0.0
    return noise.between(sigma, sigma_next) * (s_noise * sigma_next * (-(-2 * eta * h).expm1()).sqrt())

"""The samplers of the first diffusion models, in variance-exploding scale: DDIM, DDPM and PLMS.

Their papers use x_vp = x / sqrt(1 + sigma^2) and steps in alphas_cumprod = 1 / (1 + sigma^2). After substitution, the
variance of DDIM's noise, eta^2 (1 - a')/(1 - a) (1 - a/a'), is that of the ancestral sigma_up, and its direction term
is the ancestral sigma_down: DDIM with any eta is Euler ancestral with that eta, and DDPM is DDIM with eta 1. They
differ in where they start and stop (`catalog`): at unit noise, and at the model's lowest level.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from gouache.diffusion.samplers.euler import euler_ancestral
from gouache.diffusion.samplers.sampler import Denoise, NoiseSource, OnStep, report, to_d


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Song et al. 2021, eq. 12 and 16. Deterministic at eta 0, DDPM at eta 1."""
    return euler_ancestral(denoise, x, sigmas, noise=noise, on_step=on_step, eta=eta, s_noise=s_noise)


def ddpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    s_noise: float = 1.0,
) -> Tensor:
    """Ho et al. 2020, algorithm 2, with the smaller of its two variances; works for any subset of the levels."""
    return euler_ancestral(denoise, x, sigmas, noise=noise, on_step=on_step, s_noise=s_noise)


def plms(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: NoiseSource, on_step: OnStep | None = None) -> Tensor:
    """Liu et al. 2022 (PNDM) without Runge-Kutta steps: Adams-Bashforth up to order 4, with the weights of even steps.

    The slopes are the paper's noise predictions. The first of several steps is Heun's and costs one more evaluation.
    """
    slopes: list[Tensor] = []  # newest first
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        slope = to_d(x, sigma, denoised)
        slopes = [slope, *slopes[:3]]
        if index == 0 and len(sigmas) > 2:
            x_next = x + slope * (sigma_next - sigma)
            slope = (slope + to_d(x_next, sigma_next, denoise(x_next, sigma_next))) / 2
        elif len(slopes) == 2:
            slope = (3 * slopes[0] - slopes[1]) / 2
        elif len(slopes) == 3:
            slope = (23 * slopes[0] - 16 * slopes[1] + 5 * slopes[2]) / 12
        elif len(slopes) == 4:
            slope = (55 * slopes[0] - 59 * slopes[1] + 37 * slopes[2] - 9 * slopes[3]) / 24
        x = x + slope * (sigma_next - sigma)
        report(on_step, index, sigmas, x, denoised)
    return x

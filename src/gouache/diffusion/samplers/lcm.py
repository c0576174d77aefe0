"""LCM sampling: each step predicts x0 and adds new noise of the next level."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from gouache.diffusion.samplers.sampler import Denoise, NoiseSource, OnStep, report


def lcm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    s_noise: float = 1.0,
) -> Tensor:
    """Luo et al. 2023, algorithm 3 (Song et al. 2023, algorithm 1), for models distilled with this method.

    Their boundary condition, which returns x itself at t = 0, is omitted: at t = 19, the lowest timestep of these
    models, the weight of x is already below 1e-5.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        x = denoised
        if sigma_next > 0:
            x = x + noise.draw() * (s_noise * sigma_next)
        report(on_step, index, sigmas, x, denoised)
    return x

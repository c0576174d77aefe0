"""Sampling of latent consistency models: the picture, then fresh noise of the next level, and again."""

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
    """Luo et al. 2023, algorithm 3 (Song et al. 2023, algorithm 1), for models distilled to be asked so.

    Their boundary condition, which keeps x itself at t = 0, weighs x with less than 1e-5 from t = 19 on, the lowest
    level they know: it is left out.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        x = denoised
        if sigma_next > 0:
            x = x + noise.draw() * (s_noise * sigma_next)
        report(on_step, index, sigmas, x, denoised)
    return x

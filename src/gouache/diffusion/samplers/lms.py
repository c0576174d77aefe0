"""Linear multistep methods (Adams-Bashforth): the slopes seen so far, as a polynomial, integrated over the next step.

LMS draws the polynomial over sigma; DEIS over ln sigma (Zhang and Chen 2022, the log-rho variant). One evaluation a
step. Both are written for falling levels of any spacing, so the weights are worked out anew for each step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from gouache.diffusion.samplers.sampler import Denoise, NoiseSource, OnStep, report, to_d


def lms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    order: int = 4,
) -> Tensor:
    """Over sigma, through the slopes of up to `order` steps."""
    orders = [min(order, index + 1) for index in range(len(sigmas) - 1)]
    return _multistep(denoise, x, sigmas, on_step, orders, over_logarithm=False)


def deis(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    order: int = 3,
) -> Tensor:
    """Over ln sigma, through the slopes of up to `order` steps.

    The last steps of a run shorter than 15 have lower orders, for stability; the step to 0 is Euler's at any length,
    because 0 has no logarithm.
    """
    steps = len(sigmas) - 1
    orders = [min(order, index + 1, steps - index if steps < 15 else order) for index in range(steps)]
    if sigmas[-1] == 0:
        orders[-1] = 1
    return _multistep(denoise, x, sigmas, on_step, orders, over_logarithm=True)


def _multistep(
    denoise: Denoise, x: Tensor, sigmas: Tensor, on_step: OnStep | None, orders: list[int], over_logarithm: bool
) -> Tensor:
    levels: list[float] = sigmas.tolist()
    slopes: list[Tensor] = []  # newest first
    for index, order in enumerate(orders):
        denoised = denoise(x, sigmas[index])
        slopes = [to_d(x, sigmas[index], denoised), *slopes[: max(orders) - 1]]
        known = levels[index::-1][:order]
        weights = _weights(known, levels[index + 1], over_logarithm)
        for weight, slope in zip(weights, slopes):
            x = x + weight * slope
        report(on_step, index, sigmas, x, denoised)
    return x


def _weights(known: Sequence[float], sigma_next: float, over_logarithm: bool) -> list[float]:
    """What each slope, at the levels `known` (newest first), counts for in the step from known[0] to sigma_next.

    The integral over sigma of its Lagrange polynomial. Gauss' rule with 20 points is exact for the polynomials of
    LMS, and good to the last digits for those of DEIS, which the change of variable multiplies by exp(u).
    """
    if len(known) == 1:
        return [sigma_next - known[0]]
    places = np.log(known) if over_logarithm else np.array(known)
    end = np.log(sigma_next) if over_logarithm else sigma_next
    points, shares = np.polynomial.legendre.leggauss(20)
    u = places[0] + (points + 1) / 2 * (end - places[0])
    measure = shares / 2 * (end - places[0]) * (np.exp(u) if over_logarithm else 1)
    weights = []
    for own, place in enumerate(places):
        others = np.delete(places, own)
        weights.append(float((measure * np.prod((u[:, None] - others) / (place - others), axis=1)).sum()))
    return weights

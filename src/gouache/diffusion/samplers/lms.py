"""Linear multistep methods (Adams-Bashforth): a polynomial through the previous slopes, integrated over the next step.

The polynomial of LMS is in sigma, that of DEIS in ln sigma (Zhang and Chen 2022, the log-rho variant). One evaluation
per step. Both accept decreasing levels of any spacing, so the weights are computed anew for each step.
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
    """Polynomial in sigma through the slopes of up to `order` steps."""
    orders = [min(order, index + 1) for index in range(len(sigmas) - 1)]
    return _multistep(denoise, x, sigmas, on_step, orders, in_log_sigma=False)


def deis(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    order: int = 3,
) -> Tensor:
    """Polynomial in ln sigma through the slopes of up to `order` steps.

    In runs of fewer than 15 steps the last steps have lower orders, for stability. The step to 0 is always Euler's,
    because ln 0 is undefined.
    """
    steps = len(sigmas) - 1
    orders = [min(order, index + 1, steps - index if steps < 15 else order) for index in range(steps)]
    if sigmas[-1] == 0:
        orders[-1] = 1
    return _multistep(denoise, x, sigmas, on_step, orders, in_log_sigma=True)


def _multistep(
    denoise: Denoise, x: Tensor, sigmas: Tensor, on_step: OnStep | None, orders: list[int], in_log_sigma: bool
) -> Tensor:
    levels: list[float] = sigmas.tolist()
    slopes: list[Tensor] = []  # newest first
    for index, order in enumerate(orders):
        denoised = denoise(x, sigmas[index])
        slopes = [to_d(x, sigmas[index], denoised), *slopes[: max(orders) - 1]]
        known = levels[index::-1][:order]
        weights = _weights(known, levels[index + 1], in_log_sigma)
        for weight, slope in zip(weights, slopes):
            x = x + weight * slope
        report(on_step, index, sigmas, x, denoised)
    return x


def _weights(known: Sequence[float], sigma_next: float, in_log_sigma: bool) -> list[float]:
    """The weight of each slope, at the levels `known` (newest first), for the step from known[0] to sigma_next.

    It is the integral over sigma of the slope's Lagrange polynomial. Gauss-Legendre quadrature with 20 points is exact
    for the polynomials of LMS and accurate to the last digits for those of DEIS, which the change of variable
    multiplies by exp(u).
    """
    if len(known) == 1:
        return [sigma_next - known[0]]
    nodes = np.log(known) if in_log_sigma else np.array(known)
    end = np.log(sigma_next) if in_log_sigma else sigma_next
    points, gauss_weights = np.polynomial.legendre.leggauss(20)
    u = nodes[0] + (points + 1) / 2 * (end - nodes[0])
    measure = gauss_weights / 2 * (end - nodes[0]) * (np.exp(u) if in_log_sigma else 1)
    weights = []
    for index, node in enumerate(nodes):
        others = np.delete(nodes, index)
        weights.append(float((measure * np.prod((u[:, None] - others) / (node - others), axis=1)).sum()))
    return weights

"""UniPC (Zhao et al. 2023): each step has a predictor, and a corrector that uses the x0 prediction at its end.

The multistep form with B(h) and x0 prediction. The linear part of the equation in lambda = -ln sigma is solved exactly;
the differences of earlier x0 predictions from the newest are weighted to match the first derivatives in lambda. One
evaluation per step: the evaluation that corrects a step also predicts the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from gouache.diffusion.samplers.sampler import Denoise, NoiseSource, OnStep, report

Variant = Literal["bh1", "bh2"]


def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    order: int = 3,
    variant: Variant = "bh1",
) -> Tensor:
    """Deterministic. `variant` is the paper's B(h): h ("bh1") or exp(h) - 1 ("bh2"). `order` is 1 to 3.

    The order is lower at both ends of the run. The last step is not corrected, as that would cost another evaluation.
    """
    levels: list[float] = sigmas.tolist()
    steps = len(levels) - 1
    predictions: list[Tensor] = []  # newest first
    start, used = x, 1
    for index in range(steps):
        denoised = denoise(x, sigmas[index])
        if index > 0:
            x = _step(start, predictions[:used], levels[index - 1 :: -1], levels[index], variant, denoised)
        predictions = [denoised, *predictions[: order - 1]]
        start, used = x, min(order, index + 1, steps - index)
        x = _step(start, predictions[:used], levels[index::-1], levels[index + 1], variant)
        report(on_step, index, sigmas, x, denoised)
    return x


def _step(
    x: Tensor,
    predictions: Sequence[Tensor],
    levels: Sequence[float],
    sigma_next: float,
    variant: Variant,
    at_end: Tensor | None = None,
) -> Tensor:
    """x at sigma_next, from x at levels[0] and the x0 predictions at `levels` (both newest first).

    Without `at_end`, the x0 prediction at sigma_next, this is the predictor; with it, the corrector.
    """
    newest = predictions[0]
    x_next = newest + (sigma_next / levels[0]) * (x - newest)
    nodes, others = list(levels[1 : len(predictions)]), list(predictions[1:])
    if at_end is not None:
        nodes, others = [*nodes, sigma_next], [*others, at_end]
    if not others:
        return x_next
    h = math.log(levels[0] / sigma_next)
    ratios = [math.log(levels[0] / level) / h for level in nodes]
    for weight, ratio, other in zip(_weights(ratios, -h, variant), ratios, others):
        x_next = x_next - weight / ratio * (other - newest)
    return x_next


def _weights(ratios: Sequence[float], h: float, variant: Variant) -> list[float]:
    """B(h) times the solution of the paper's eq. 8, for differences at `ratios` of the step; h is negative here.

    Its right side is b_n = n! phi_(n+1)(h) h / B(h). A single difference has weight 1/2, the authors' simplification.
    """
    scale = h if variant == "bh1" else math.expm1(h)
    if len(ratios) == 1:
        return [scale / 2]
    right = []
    term = math.expm1(h) / h - 1  # h phi_2(h)
    for n in range(1, len(ratios) + 1):
        right.append(term * math.factorial(n) / scale)
        term = term / h - 1 / math.factorial(n + 1)
    powers = np.vander(ratios, increasing=True).T
    return [scale * weight for weight in np.linalg.solve(powers, np.array(right))]

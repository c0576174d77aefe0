"""UniPC (Zhao et al. 2023): each step is predicted, and corrected once the picture at its end has been seen.

The multistep form with B(h) and predicted pictures. The linear part of the equation in lambda = -ln sigma is solved
exactly; differences of pictures to the newest one are weighed so that the first derivatives in lambda come out right.
One evaluation a step: the one that corrects a step also predicts the next.
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
    """Deterministic; `variant` is the paper's B(h), h or exp(h) - 1. `order` is 1 to 3, lower at both ends of the run.

    The last step is not corrected: that would cost an evaluation more.
    """
    levels: list[float] = sigmas.tolist()
    steps = len(levels) - 1
    pictures: list[Tensor] = []  # newest first
    start, used = x, 1
    for index in range(steps):
        denoised = denoise(x, sigmas[index])
        if index > 0:
            x = _step(start, pictures[:used], levels[index - 1 :: -1], levels[index], variant, denoised)
        pictures = [denoised, *pictures[: order - 1]]
        start, used = x, min(order, index + 1, steps - index)
        x = _step(start, pictures[:used], levels[index::-1], levels[index + 1], variant)
        report(on_step, index, sigmas, x, denoised)
    return x


def _step(
    x: Tensor,
    pictures: Sequence[Tensor],
    levels: Sequence[float],
    sigma_next: float,
    variant: Variant,
    at_end: Tensor | None = None,
) -> Tensor:
    """From levels[0] to sigma_next, by the pictures seen at `levels` (both newest first), and the one seen at the end.

    Without `at_end` it is the predictor, with it the corrector.
    """
    newest = pictures[0]
    moved = newest + (sigma_next / levels[0]) * (x - newest)
    places, others = list(levels[1 : len(pictures)]), list(pictures[1:])
    if at_end is not None:
        places, others = [*places, sigma_next], [*others, at_end]
    if not others:
        return moved
    h = math.log(levels[0] / sigma_next)
    ratios = [math.log(levels[0] / place) / h for place in places]
    for weight, ratio, picture in zip(_weights(ratios, -h, variant), ratios, others):
        moved = moved - weight / ratio * (picture - newest)
    return moved


def _weights(ratios: Sequence[float], h: float, variant: Variant) -> list[float]:
    """B(h) times the solution of the paper's eq. 8, for differences at `ratios` of the step; h is negative here.

    Its right side is b_n = n! phi_(n+1)(h) h / B(h). A single difference weighs one half, as the authors simplify.
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
    return [scale * share for share in np.linalg.solve(powers, np.array(right))]

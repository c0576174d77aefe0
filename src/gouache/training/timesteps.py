"""Which timesteps are trained, and how often: distributions of t over the levels of a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gouache.errors import RequestError

Distribution = Literal["uniform", "logit-normal", "mode", "cos-map", "sigmoid", "parabola", "beta"]

_POINTS = 4096  # of a density without a closed quantile function


@dataclass(frozen=True)
class Timesteps:
    """The timesteps from `first` up to but not including `last` (None: all), as `distribution` of their share x.

    x is 0 at the level with the least noise of that range and 1 at the one with the most.

    - "uniform".
    - "logit-normal": logit(x) is normal with `mean` and deviation `scale` (Esser et al. 2024).
    - "mode": 1 - u - scale * (cos(pi u / 2)^2 - 1 + u) for uniform u (the same paper; OneTrainer's "heavy tail").
    - "cos-map": the density is that of the cosine schedule (the same paper).
    - "sigmoid": the density is sigmoid(scale * (x - 0.5 - mean)): more of the noisy levels (OneTrainer).
    - "parabola": the density is 2 - scale * (x - 0.5 - mean)^2 where that is positive (OneTrainer).
    - "beta": a beta distribution with `alpha` and `beta`.

    `shift` moves x to shift * x / (1 + (shift - 1) * x); above 1 there are more of the noisy levels.
    """

    distribution: Distribution = "uniform"
    mean: float = 0.0
    scale: float = 1.0
    alpha: float = 2.0
    beta: float = 2.0
    shift: float = 1.0
    first: int = 0
    last: int | None = None

    def __post_init__(self) -> None:
        if self.distribution not in get_args(Distribution):
            known = ", ".join(get_args(Distribution))
            raise RequestError("timesteps", f"distribution {self.distribution!r} is not known; use {known}")
        if not (self.scale >= 0 and self.shift > 0 and self.alpha > 0 and self.beta > 0):
            raise RequestError("timesteps", "shift, alpha and beta must be positive and scale at least 0")
        if self.distribution == "mode" and self.scale > 2 / (math.pi - 2):  # beyond, the formula leaves [0, 1]
            raise RequestError("timesteps", f"scale of 'mode' is at most 1.75, got {self.scale:g}")

    def sample(self, count: int, levels: int, generator: torch.Generator) -> Tensor:
        """(count,) timesteps of a schedule with `levels`, int64. Raises RequestError if the range is not within it."""
        last = levels if self.last is None else self.last
        if not 0 <= self.first < last <= levels:
            raise RequestError(
                "timesteps", f"the range {self.first} to {last} is not within the {levels} levels of this model"
            )
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        size = last - self.first
        return self.first + (self.quantile(uniform) * size).long().clamp(0, size - 1)

    def quantile(self, u: Tensor) -> Tensor:
        """x (float64) such that a share u of the samples is below it."""
        x = self._unshifted(u)
        return self.shift * x / (1 + (self.shift - 1) * x)

    def _unshifted(self, u: Tensor) -> Tensor:
        match self.distribution:
            case "uniform":
                return u
            case "logit-normal":
                return (self.mean + self.scale * torch.special.ndtri(u)).sigmoid()
            case "mode":
                v = 1 - u  # the formula decreases in its argument
                return 1 - v - self.scale * ((math.pi / 2 * v).cos() ** 2 - 1 + v)
            case "cos-map":
                return 1 - 1 / ((math.pi / 2 * u).tan() + 1)
            case "sigmoid":
                return _inverse(lambda x: (self.scale * (x - 0.5 - self.mean)).sigmoid(), u)
            case "parabola":
                return _inverse(lambda x: (2 - self.scale * (x - 0.5 - self.mean) ** 2).clamp_min(0), u)
            case "beta":
                return _inverse(lambda x: x ** (self.alpha - 1) * (1 - x) ** (self.beta - 1), u)


ALL = Timesteps()
"""All timesteps equally often."""


def _inverse(density: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """The quantiles u of a density on [0, 1], which need not be normalised: linear between `_POINTS` points."""
    middles = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), density(middles).cumsum(0)])
    if not float(cumulative[-1]) > 0:
        raise RequestError("timesteps", "with this mean and scale no timestep has a positive density")
    cumulative = cumulative / cumulative[-1]
    high = torch.searchsorted(cumulative, u, right=True).clamp(1, _POINTS)
    below, above = cumulative[high - 1], cumulative[high]
    return (high - 1 + ((u - below) / (above - below).clamp_min(1e-300)).clamp(0, 1)) / _POINTS

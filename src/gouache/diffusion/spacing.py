"""The noise levels of a run: functions (schedule, steps) -> sigmas, under the names that A1111 gives them.

`sigmas` has steps + 1 float32 values on the CPU, strictly decreasing, the last 0. "Automatic" is not a function: it
selects the sampler's default spacing (`samplers.catalog`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gouache.diffusion.beta import beta_quantile
from gouache.diffusion.names import normalize, suggestion
from gouache.diffusion.schedule import Schedule
from gouache.errors import RequestError

AUTOMATIC = "Automatic"


def uniform(schedule: Schedule, steps: int) -> Tensor:
    """Evenly spaced timesteps, from the last to the first."""
    return _with_zero(schedule.sigma(_timesteps(schedule, steps)))


def sgm_uniform(schedule: Schedule, steps: int) -> Tensor:
    """Evenly spaced timesteps without the lowest one, which is replaced by 0 (Stability's SGM)."""
    return _with_zero(schedule.sigma(_timesteps(schedule, steps + 1)[:-1]))


def karras(schedule: Schedule, steps: int, rho: float = 7.0) -> Tensor:
    """Evenly spaced in sigma^(1 / rho) (Karras et al. 2022, eq. 5)."""
    high, low = schedule.sigma_max ** (1 / rho), schedule.sigma_min ** (1 / rho)
    return _with_zero(torch.linspace(high, low, steps, dtype=torch.float64) ** rho)


def exponential(schedule: Schedule, steps: int) -> Tensor:
    """Evenly spaced in ln sigma."""
    return polyexponential(schedule, steps, rho=1.0)


def polyexponential(schedule: Schedule, steps: int, rho: float = 1.0) -> Tensor:
    """ln sigma decreases as the power `rho` of the remaining fraction; with the default rho 1 it is `exponential`."""
    low = math.log(schedule.sigma_min)
    remaining = torch.linspace(1, 0, steps, dtype=torch.float64) ** rho
    return _with_zero((low + remaining * (math.log(schedule.sigma_max) - low)).exp())


def simple(schedule: Schedule, steps: int) -> Tensor:
    """Trained levels, from the last downwards in strides of T / steps, rounded down."""
    levels = len(schedule.sigmas)
    _check_enough(levels, steps, "Simple")
    offset = torch.tensor([step * levels // steps for step in range(steps)])
    return _with_zero(schedule.sigmas[levels - 1 - offset])


def ddim(schedule: Schedule, steps: int) -> Tensor:
    """Trained levels from the second upwards in strides of T // steps: for T = 1000, 20 steps, 951, 901, ..., 1.

    The spacing of the latent diffusion code ("leading" with an offset of 1 in diffusers). The offset is 0 where it
    would exceed the last level, as at T steps.
    """
    levels = len(schedule.sigmas)
    _check_enough(levels, steps, "DDIM")
    stride = levels // steps
    offset = min(1, levels - 1 - (steps - 1) * stride)
    return _with_zero(schedule.sigmas[torch.arange(steps - 1, -1, -1) * stride + offset])


def beta(schedule: Schedule, steps: int, alpha: float = 0.6, beta: float = 0.6) -> Tensor:
    """Quantiles of the Beta distribution from sigma_min to sigma_max (Lee et al. 2024): dense at both ends.

    The quantiles are noise levels, as in A1111 and diffusers; ComfyUI's spacing of this name uses them as timesteps.
    """
    share = beta_quantile(torch.linspace(1, 0, steps, dtype=torch.float64), alpha, beta)
    return _with_zero(schedule.sigma_min + share * (schedule.sigma_max - schedule.sigma_min))


@dataclass(frozen=True)
class Spacing:
    """A spacing with its name in A1111 and its other common names."""

    name: str
    function: Callable[[Schedule, int], Tensor]
    aliases: tuple[str, ...] = ()


SPACINGS = (
    Spacing("Uniform", uniform),
    Spacing("Karras", karras, ("ka",)),
    Spacing("Exponential", exponential, ("exp",)),
    Spacing("Polyexponential", polyexponential),
    Spacing("SGM Uniform", sgm_uniform, ("SGMUniform",)),
    Spacing("Simple", simple),
    Spacing("Normal", uniform),  # ComfyUI's name for Uniform
    Spacing("DDIM", ddim, ("ddim_uniform",)),
    Spacing("Beta", beta),
)


def sigmas(schedule: Schedule, steps: int, name: str = "Karras") -> Tensor:
    """The (steps + 1,) noise levels of a run, by the name of their spacing. Raises RequestError."""
    return by_name(name).function(schedule, steps)


def by_name(name: str) -> Spacing:
    """The spacing called `name`, ignoring case, spaces and underscores. Raises RequestError, also for "Automatic"."""
    for spacing in SPACINGS:
        if normalize(name) in map(normalize, (spacing.name, *spacing.aliases)):
            return spacing
    known = [AUTOMATIC, *(spacing.name for spacing in SPACINGS)]
    raise RequestError("schedule", f"{name!r} is not known; {suggestion(name, known)}")


def _timesteps(schedule: Schedule, count: int) -> Tensor:
    """`count` evenly spaced timesteps from the schedule's last to its first, float64."""
    first, last = (float(schedule.t(sigma)) for sigma in (schedule.sigma_min, schedule.sigma_max))
    return torch.linspace(last, first, count, dtype=torch.float64)


def _with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas.float(), torch.zeros(1)])


def _check_enough(levels: int, steps: int, name: str) -> None:
    if steps > levels:
        raise RequestError(
            "steps", f"{steps} is more than the {levels} trained levels that {name} selects from; use fewer, or Karras"
        )

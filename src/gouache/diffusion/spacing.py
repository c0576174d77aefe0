"""Which noise levels a run visits: functions (schedule, steps) -> sigmas, with the meaning A1111 gives the names.

`sigmas` has steps + 1 float32 values on the CPU, strictly falling, the last 0. "Automatic" is no function: it stands
for the spacing that a sampler names as its own (`samplers.catalog`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gouache.diffusion.beta import beta_quantile
from gouache.diffusion.names import closest, plain
from gouache.diffusion.schedule import Schedule
from gouache.errors import RequestError

AUTOMATIC = "Automatic"


def uniform(schedule: Schedule, steps: int) -> Tensor:
    """Even in the network's time, from its last to its first."""
    return _with_zero(schedule.sigma(_times(schedule, steps)))


def sgm_uniform(schedule: Schedule, steps: int) -> Tensor:
    """Even in time, but for the first time's level: the step that would visit it goes to 0 (Stability's SGM)."""
    return _with_zero(schedule.sigma(_times(schedule, steps + 1)[:-1]))


def karras(schedule: Schedule, steps: int, rho: float = 7.0) -> Tensor:
    """Even in sigma^(1 / rho) (Karras et al. 2022, eq. 5)."""
    high, low = schedule.sigma_max ** (1 / rho), schedule.sigma_min ** (1 / rho)
    return _with_zero(torch.linspace(high, low, steps, dtype=torch.float64) ** rho)


def exponential(schedule: Schedule, steps: int) -> Tensor:
    """Even in ln sigma."""
    return polyexponential(schedule, steps, rho=1.0)


def polyexponential(schedule: Schedule, steps: int, rho: float = 1.0) -> Tensor:
    """ln sigma falls as a power `rho` of the way left; at the usual rho of 1 this is `exponential`."""
    low = math.log(schedule.sigma_min)
    way_left = torch.linspace(1, 0, steps, dtype=torch.float64) ** rho
    return _with_zero((low + way_left * (math.log(schedule.sigma_max) - low)).exp())


def simple(schedule: Schedule, steps: int) -> Tensor:
    """Trained levels, counted down from the last in strides of T / steps, rounded down."""
    levels = len(schedule.sigmas)
    _check_enough(levels, steps, "Simple")
    back = torch.tensor([step * levels // steps for step in range(steps)])
    return _with_zero(schedule.sigmas[levels - 1 - back])


def ddim(schedule: Schedule, steps: int) -> Tensor:
    """Trained levels from the second on in whole strides of T // steps: of 1000, in 20 steps, 951, 901, ..., 1.

    The latent diffusion authors' spacing ("leading" with an offset of 1 in diffusers). Where the strides leave no
    room for the offset, as at T steps, it is 0.
    """
    levels = len(schedule.sigmas)
    _check_enough(levels, steps, "DDIM")
    stride = levels // steps
    offset = min(1, levels - 1 - (steps - 1) * stride)
    return _with_zero(schedule.sigmas[torch.arange(steps - 1, -1, -1) * stride + offset])


def beta(schedule: Schedule, steps: int, alpha: float = 0.6, beta: float = 0.6) -> Tensor:
    """Quantiles of the Beta distribution between sigma_min and sigma_max (Lee et al. 2024): dense at both ends.

    As in A1111 and diffusers the quantiles are levels; ComfyUI's spacing of this name takes them for times.
    """
    share = beta_quantile(torch.linspace(1, 0, steps, dtype=torch.float64), alpha, beta)
    return _with_zero(schedule.sigma_min + share * (schedule.sigma_max - schedule.sigma_min))


@dataclass(frozen=True)
class Spacing:
    """A spacing under its name in A1111, with the other names users know it by."""

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
    Spacing("Normal", uniform),  # ComfyUI's word for Uniform
    Spacing("DDIM", ddim, ("ddim_uniform",)),
    Spacing("Beta", beta),
)


def by_name(name: str) -> Spacing:
    """The spacing called `name`; case, spaces and underscores do not matter. Not for "Automatic"."""
    for spacing in SPACINGS:
        if plain(name) in map(plain, (spacing.name, *spacing.aliases)):
            return spacing
    known = [AUTOMATIC, *(spacing.name for spacing in SPACINGS)]
    raise RequestError("schedule", f"{name!r} is not known; {closest(name, known)}")


def _times(schedule: Schedule, count: int) -> Tensor:
    """`count` times from the last the network knows to the first, evenly."""
    first, last = (float(schedule.t(sigma)) for sigma in (schedule.sigma_min, schedule.sigma_max))
    return torch.linspace(last, first, count, dtype=torch.float64)


def _with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas.float(), torch.zeros(1)])


def _check_enough(levels: int, steps: int, name: str) -> None:
    if steps > levels:
        raise RequestError(
            "steps", f"{steps} are more than the {levels} levels that {name} picks from; take fewer, or Karras"
        )

"""The learning rate as a function of the settings and the step, so that nothing about it has to be saved.

A schedule is a factor of the learning rate that depends on the progress after the warm-up, from 0 to 1, and decreases
to `final_rate`. The schedules of torch and transformers can be used too, by their dotted path.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from gouache.errors import RequestError, printable

if TYPE_CHECKING:
    from gouache.training.settings import Settings


def rate(settings: Settings, step: int) -> float:
    """The learning rate of step `step`, counted from 0."""
    warmup = steps_of(settings.warmup, settings.steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule not in SCHEDULES:
        rates = settings.imported_rates
        return rates[min(step - warmup, len(rates) - 1)]
    progress = min((step - warmup) / max(1, settings.steps - warmup), 1.0)
    height = SCHEDULES[settings.schedule](settings, progress)
    return settings.learning_rate * (settings.final_rate + (1 - settings.final_rate) * height)


def steps_of(amount: float, steps: int) -> int:
    """A number of steps, given as such or, below 1, as a share of all `steps`."""
    return round(amount * steps) if amount < 1 else int(amount)


def _cosine(settings: Settings, progress: float) -> float:
    """Half a cosine `restarts` + 1 times, each from the full rate."""
    part = progress * (settings.restarts + 1)
    return 0.5 * (1 + math.cos(math.pi * (1.0 if progress >= 1 else part % 1)))


def _warmup_stable_decay(settings: Settings, progress: float) -> float:
    """Constant, then linear over the last `decay` steps."""
    after = settings.steps - steps_of(settings.warmup, settings.steps)
    decay = min(steps_of(settings.decay, settings.steps), after)
    return min(1.0, (1 - progress) * after / max(1, decay))


def _inverse_sqrt(settings: Settings, progress: float) -> float:
    """1 / sqrt(step), continuing the warm-up: after four times the warm-up's steps the rate is half its peak."""
    warmup = steps_of(settings.warmup, settings.steps)
    scale = warmup or 10_000
    return math.sqrt(scale / (scale + progress * (settings.steps - warmup)))


SCHEDULES: Mapping[str, Callable[[Settings, float], float]] = {
    "constant": lambda settings, progress: 1.0,
    "linear": lambda settings, progress: 1 - progress,
    "cosine": _cosine,
    "polynomial": lambda settings, progress: (1 - progress) ** settings.power,
    "rex": lambda settings, progress: 2 * (1 - progress) / (2 - progress),  # Chen et al. 2021
    "warmup-stable-decay": _warmup_stable_decay,
    "inverse-sqrt": _inverse_sqrt,
}


def imported_rates(settings: Settings) -> list[float]:
    """The rates of a schedule given by the dotted path of a class or function, for all steps after the warm-up.

    It is called with an optimizer and `schedule_arguments`, and must depend on nothing but the number of its steps.
    Raises RequestError if it cannot be imported or does not accept this.
    """
    make = imported("schedule", settings.schedule, f"use {', '.join(SCHEDULES)}, or the dotted path of a class")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch advises to call optimizer.step() first
            schedule = make(optimizer, **settings.schedule_arguments)
            rates = []
            for _ in range(max(1, settings.steps - steps_of(settings.warmup, settings.steps))):
                rates.append(float(optimizer.param_groups[0]["lr"]))
                schedule.step()
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        problem = printable(" ".join(str(error).split()))
        raise RequestError("schedule", f"{printable(settings.schedule)} cannot be used: {problem}") from None
    return rates


def imported(setting: str, path: str, advice: str) -> Any:
    """What the dotted `path` names. Its module's code is run, so paths belong only in settings that the user wrote."""
    module, _, name = path.rpartition(".")
    if not module:
        raise RequestError(setting, f"{printable(path, 80)!r} is not known; {advice}")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RequestError(setting, printable(f"{path} cannot be imported: {error}")) from None

"""The training loop: one for every objective.

    settings, objective, batches -> begin or resume -> per step: losses, gradients, optimizer, average -> checkpoints

The body of `train` is the second straight line of the house. It knows no network and no data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gouache.errors import TrainingError
from gouache.files.write import write_safetensors
from gouache.training import state as checkpoint
from gouache.training.interrupt import stop_signals
from gouache.training.log import Log
from gouache.training.objective import Objective
from gouache.training.settings import Settings
from gouache.training.snapshot import Run, averaged, begin, put_back, take, weights

Batches = Callable[[int], Any]
"""The batch of a number, counted from 0: a function of the number alone, so that a run can resume anywhere."""


@dataclass(frozen=True)
class Progress:
    """Told after each logged step. `seconds` is this sitting's time, `left` an estimate of what remains."""

    step: int
    steps: int
    losses: Mapping[str, float]
    seconds: float
    left: float


@dataclass(frozen=True)
class Result:
    """How a run ended: at `step`, `finished` or stopped. `weights` are averages where some are kept, `last` are not."""

    step: int
    finished: bool
    weights: Mapping[str, Tensor]
    last: Mapping[str, Tensor]


def train(
    objective: Objective,
    batches: Batches,
    settings: Settings,
    folder: Path,
    *,
    on_log: Callable[[Progress], None] | None = None,
    validate: Callable[[], Mapping[str, float]] | None = None,
    seconds: float = math.inf,
) -> Result:
    """Train until `settings.steps`, or for `seconds`, or until Ctrl-C; then save. Called again, it goes on.

    `folder` holds the checkpoints and `log.jsonl`. `validate` is called with the averaged weights in place; the
    weights of the lowest "loss" it returned are kept as `best.safetensors`. Raises TrainingError when a loss or
    gradient is not finite, when another run trains in the folder, or when the folder belongs to a different run.
    """
    with checkpoint.locked(folder), stop_signals() as stopped:
        run = begin(objective, settings)
        step, best = _resume(run, folder)
        first = saved = step
        began = saved_at = time.monotonic()
        log = Log(folder / "log.jsonl", step)

        while step < settings.steps and not stopped() and time.monotonic() - began < seconds:
            losses = _descend(objective, batches, step, settings.accumulate)
            norm = torch.nn.utils.clip_grad_norm_(run.parameters.values(), settings.clip_norm)
            if not torch.isfinite(norm + losses["loss"]):
                raise TrainingError(_not_finite(step, losses, saved, folder))
            for group in run.optimizer.param_groups:
                group["lr"] = settings.rate(step) * group["rate"]
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            if run.ema is not None:
                run.ema.update(run.parameters)
            step += 1

            if step % settings.log_steps == 0 or step == settings.steps:
                passed = time.monotonic() - began
                left = passed / (step - first) * (settings.steps - step)
                told = Progress(step, settings.steps, _floats(losses), passed, left)
                log.write(step=step, rate=settings.rate(step - 1), norm=float(norm), **told.losses)
                if on_log is not None:
                    on_log(told)
            if validate is not None and (step % settings.validate_steps == 0 or step == settings.steps):
                with averaged(run):
                    scores = dict(validate())
                    log.write(step=step, **{f"validation {name}": value for name, value in scores.items()})
                    if scores["loss"] < best:
                        best = scores["loss"]
                        write_safetensors(folder / "best.safetensors", weights(run.networks))
            if time.monotonic() - saved_at > settings.save_seconds:
                checkpoint.save(folder, take(run, step, best), settings.keep)
                saved, saved_at = step, time.monotonic()

        if step > saved:
            checkpoint.save(folder, take(run, step, best), settings.keep)
        last = {name: tensor.clone() for name, tensor in weights(run.networks).items()}
        with averaged(run):
            means = {name: tensor.clone() for name, tensor in weights(run.networks).items()}
        return Result(step, step >= settings.steps, means, last)


def _resume(run: Run, folder: Path) -> tuple[int, float]:
    """Put the newest whole checkpoint in place; (its step, the lowest validation loss), or (0, inf) if none was."""
    state = checkpoint.newest(folder)
    if state is None:
        return 0, math.inf
    step, best = put_back(run, state, folder)
    checkpoint.set_aside(folder, after=step)
    return step, best


def _descend(objective: Objective, batches: Batches, step: int, accumulate: int) -> dict[str, Tensor]:
    """The gradients of one step's batches, added up in the parameters; returns the mean of each loss."""
    means: dict[str, Tensor] = {}
    for number in range(step * accumulate, (step + 1) * accumulate):
        losses = objective.losses(batches(number), number)
        (losses["loss"] / accumulate).backward()
        for name, value in losses.items():
            share = value.detach() / accumulate
            means[name] = means[name] + share if name in means else share
    return means


def _not_finite(step: int, losses: Mapping[str, Tensor], saved: int, folder: Path) -> str:
    told = ", ".join(f"{name} {float(value):g}" for name, value in losses.items())
    found = f"step {step + 1}: a loss or gradient is not finite ({told})"
    kept = f"{folder} holds the good checkpoint of step {saved}" if saved else "no checkpoint was saved yet"
    return f"{found}; {kept}; train in a new folder with a lower learning rate"


def _floats(losses: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in losses.items()}

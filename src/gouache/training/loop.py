"""The training loop, the same for every objective.

    settings, objective, batches -> begin or resume -> per step: losses, gradients, optimizer, average -> checkpoints

The body of `train` is the main pipeline of training. It knows no network and no data.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gouache.errors import TrainingError, printable
from gouache.files.write import write_safetensors
from gouache.training import state as checkpoint
from gouache.training.interrupt import stop_signals
from gouache.training.log import Log
from gouache.training.objective import Objective
from gouache.training.settings import Settings
from gouache.training.snapshot import Run, averaged, begin, capture, fault, restore, weights

Batches = Callable[[int], Any]
"""Returns the batch of a number, counted from 0. It depends on the number alone, so that a run can resume anywhere."""


@dataclass(frozen=True)
class Progress:
    """Passed to `on_log`. `seconds` is the time since this call of `train` began, `left` the estimated time left."""

    step: int
    steps: int
    losses: Mapping[str, float]
    seconds: float
    left: float


@dataclass(frozen=True)
class Result:
    """A run that has ended at `step`, because it was `finished` or stopped.

    `last` are the weights that its checkpoints contain (trained parameters, and frozen ones if the objective names no
    base); `weights` are the same with averages where they are kept.
    """

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
    on_preview: Callable[[int], None] | None = None,
    preview_steps: Container[int] = (),
    should_stop: Callable[[], bool] | None = None,
    seconds: float = math.inf,
    on_note: checkpoint.OnNote | None = None,
) -> Result:
    """Train until `settings.steps`, for `seconds`, or until Ctrl-C or `should_stop()`; then save. A later call resumes.

    `folder` contains the checkpoints and `log.jsonl`. `validate` and `on_preview` are called with the averaged weights
    in the networks: `validate` every `settings.validate_steps`, and the weights with the lowest "loss" it returned are
    kept as `best.safetensors`; `on_preview` with the number of steps done, for the numbers in `preview_steps` (0 is
    before the first step; an interval is a `range`). `should_stop` is polled between steps; it is for callers outside
    the main thread, where no signal arrives. `on_note` receives lines such as "step-00000003 is damaged ..."; without
    it they are printed on stderr.

    Raises TrainingError when a loss or gradient is not finite, when another run trains in the folder, or when the
    folder belongs to a different run; RequestError when the optimizer is not known.
    """
    with checkpoint.locked(folder), stop_signals() as interrupted:
        run = begin(objective, settings)
        step, best = _resume(run, folder, on_note or _print_note)
        first = saved = step
        began = saved_at = time.monotonic()
        log = Log(folder / "log.jsonl", step)

        def stopped() -> bool:
            return interrupted() or time.monotonic() - began >= seconds or (should_stop is not None and should_stop())

        def preview() -> None:
            if on_preview is not None and step in preview_steps:
                with averaged(run):
                    on_preview(step)

        if step == 0:
            preview()
        while step < settings.steps and not stopped():
            losses = accumulate_gradients(objective, batches, step, settings.accumulate)
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
                progress = Progress(step, settings.steps, _floats(losses), passed, left)
                log.write(step=step, rate=settings.rate(step - 1), norm=float(norm), **progress.losses)
                if on_log is not None:
                    on_log(progress)
            if validate is not None and (step % settings.validate_steps == 0 or step == settings.steps):
                with averaged(run):
                    scores = dict(validate())
                    log.write(step=step, **{f"validation {name}": value for name, value in scores.items()})
                    if scores["loss"] < best:
                        best = scores["loss"]
                        write_safetensors(folder / "best.safetensors", weights(run))
            preview()
            if time.monotonic() - saved_at > settings.save_seconds:
                checkpoint.save(folder, capture(run, step, best), settings.keep)
                saved, saved_at = step, time.monotonic()

        if step > saved:
            checkpoint.save(folder, capture(run, step, best), settings.keep)
        last = {name: tensor.clone() for name, tensor in weights(run).items()}
        with averaged(run):
            means = {name: tensor.clone() for name, tensor in weights(run).items()}
        return Result(step, step >= settings.steps, means, last)


def accumulate_gradients(objective: Objective, batches: Batches, step: int, accumulate: int) -> dict[str, Tensor]:
    """Add the mean gradient of one step's `accumulate` batches to the parameters; returns the mean of each loss."""
    means: dict[str, Tensor] = {}
    for number in range(step * accumulate, (step + 1) * accumulate):
        losses = objective.losses(batches(number), number)
        (losses["loss"] / accumulate).backward()
        for name, value in losses.items():
            part = value.detach() / accumulate
            means[name] = means[name] + part if name in means else part
    return means


def _resume(run: Run, folder: Path, on_note: checkpoint.OnNote) -> tuple[int, float]:
    """Restore the newest undamaged checkpoint; its step and lowest validation loss, or (0, inf) if there is none."""
    state = checkpoint.newest(folder, fault=fault, on_note=on_note)
    if state is None:
        checkpoint.start_over(folder, on_note)
        return 0, math.inf
    step, best = restore(run, state, folder)
    checkpoint.set_aside(folder, after=step)
    return step, best


def _print_note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)


def _not_finite(step: int, losses: Mapping[str, Tensor], saved: int, folder: Path) -> str:
    values = ", ".join(f"{name} {float(value):g}" for name, value in losses.items())
    problem = f"step {step + 1}: a loss or gradient is not finite ({values})"
    kept = (
        f"the checkpoint of step {saved} in {printable(str(folder))} is good"
        if saved
        else "no checkpoint was saved yet"
    )
    return f"{problem}; {kept}; train in a new folder with a lower learning rate"


def _floats(losses: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in losses.items()}

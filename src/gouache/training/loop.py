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
from typing import Literal

from torch import Tensor

from gouache.training import nonfinite
from gouache.training import state as checkpoint
from gouache.training.interrupt import requests
from gouache.training.log import LOG, TIMES, Clock, Log
from gouache.training.objective import Objective
from gouache.training.position import Position
from gouache.training.retention import Saves, is_multiple
from gouache.training.settings import Settings
from gouache.training.snapshot import Run, averaged, averages, begin, fault, is_finite, restore, weights
from gouache.training.stability import overfitting
from gouache.training.step import Batches, accumulate_gradients, clip_gradients, update
from gouache.training.validation import Validate, evaluating, measure


@dataclass(frozen=True)
class Progress:
    """Passed to `on_log`. `seconds` is the time since this call of `train` began, `left` the estimated time left.

    `rate` is the learning rate of the step and `norm` that of its gradient before clipping.
    """

    step: int
    steps: int
    losses: Mapping[str, float]
    seconds: float
    left: float
    rate: float
    norm: float


@dataclass(frozen=True)
class Result:
    """A run that has ended at `step`, because it was `finished` or stopped.

    `reason` is "steps" if all were done, "patience" if validation did not improve, or "stopped". `last` are the weights
    that its checkpoints contain (trained parameters, and frozen ones if the objective names no base); `weights` are the
    same with averages where they are kept. `best` are the steps with the lowest validation losses, the lowest first;
    their checkpoints are kept.
    """

    step: int
    reason: Literal["steps", "patience", "stopped"]
    weights: Mapping[str, Tensor]
    last: Mapping[str, Tensor]
    best: tuple[int, ...] = ()

    @property
    def finished(self) -> bool:
        return self.reason != "stopped"


def train(
    objective: Objective,
    batches: Batches,
    settings: Settings,
    folder: Path,
    *,
    on_log: Callable[[Progress], None] | None = None,
    validate: Validate | None = None,
    on_preview: Callable[[int], None] | None = None,
    preview_steps: Container[int] = (),
    should_stop: Callable[[], bool] | None = None,
    seconds: float = math.inf,
    on_note: checkpoint.OnNote | None = None,
    epoch_batches: int = 0,
) -> Result:
    """Train until `settings.steps`, for `seconds`, or until Ctrl-C or `should_stop()`; then save. A later call resumes.

    `folder` contains the checkpoints and the logs. `validate` and `on_preview` are called with the averaged weights in
    the networks: `validate` every `settings.validate_steps`, and once more with the last weights; `on_preview` with the
    number of steps done, for the numbers in `preview_steps` (0 is before the first step; an interval is a `range`).
    `should_stop` is polled between steps; it is for callers outside the main thread, where no signal arrives. A
    checkpoint is saved at once when SIGUSR1 or a file `save-now` in `folder` asks for it. `on_note` receives lines such
    as "step-00000003 is damaged ..."; without it they are printed on stderr. `epoch_batches` is the number of batches
    per epoch, for `settings.save_epochs`.

    Raises TrainingError when a loss or gradient is not finite and `settings.not_finite` is "stop", when another run
    trains in the folder, when the folder belongs to a different run, or when its disk is full; RequestError when the
    optimizer or the schedule is not known.
    """
    note = on_note or _print_note
    with checkpoint.locked(folder), requests(folder) as requested:
        run = begin(objective, settings)
        position = _resume(run, folder, note)
        saves = Saves(run, folder, position.step, epoch_batches)
        log, times, clock = Log(folder / LOG, position.step), Log(folder / TIMES, position.step), Clock()
        batches = clock.measured("data", batches)
        overfits = overfitting(log.lines)
        first, began = position.step, time.monotonic()

        def running() -> bool:
            stopped = requested.stop or time.monotonic() - began >= seconds
            stopped = stopped or (should_stop is not None and should_stop())
            return position.step < settings.steps and not position.without_patience(settings) and not stopped

        def preview() -> None:
            if on_preview is not None and position.step in preview_steps:
                with clock.measure("previews"), averaged(run), evaluating(objective.networks):
                    on_preview(position.step)

        def skip_step(losses: Mapping[str, Tensor]) -> None:
            if settings.not_finite == "stop" and is_finite(run):
                saves.save(position)  # what was trained so far is good
            note(nonfinite.skip(run, position, folder, saves.step, batches, losses))
            for each in (log, times):
                each.return_to(position.step)

        def save() -> None:
            if not is_finite(run):
                skip_step({})
                return
            with clock.measure("saving"):
                written = saves.save(position)
            clock.add("saves", 1 if written else 0)
            clock.add("bytes", written)

        if position.step == 0:
            preview()
        while running():
            step, losses, norm = position.step, {}, 0.0
            if step not in position.skipped:
                losses = accumulate_gradients(run, batches, position.number)
                norm = clip_gradients(run)
                if not nonfinite.step_is_finite(losses, norm):
                    skip_step(losses)
                    continue
                update(run, step)
            position.advance(settings)
            last = position.step == settings.steps
            logs = last or is_multiple(position.step, settings.log_steps)
            is_among_best = False

            if logs:
                log.write(**_measurements(run, position, losses, norm))
                if on_log is not None and losses:
                    passed = time.monotonic() - began
                    left = passed / max(1, position.step - first) * (settings.steps - position.step)
                    rate, values = settings.rate(step), _floats(losses)
                    on_log(Progress(position.step, settings.steps, values, passed, left, rate, float(norm)))
            if validate is not None and (last or is_multiple(position.step, settings.validate_steps)):
                with clock.measure("validation"):
                    scores = measure(run, validate)
                log.write(step=position.step, **{f"validation {name}": value for name, value in scores.items()})
                is_among_best = position.validated(scores["loss"], settings)
                if (remark := overfitting(log.lines)) and not overfits:
                    note(remark)
                overfits = bool(remark)
            preview()
            if is_among_best or saves.due(position) or requested.saving():
                save()
            if logs:
                times.write(step=position.step, **clock.take())

        save()
        return _result(run, position)


def _resume(run: Run, folder: Path, on_note: checkpoint.OnNote) -> Position:
    """Restore the newest undamaged checkpoint, if there is one."""
    state = checkpoint.newest(folder, fault=fault, on_note=on_note)
    if state is None:
        checkpoint.start_over(folder, on_note)
        return Position()
    position = restore(run, state, folder)
    checkpoint.set_aside(folder, after=position.step)
    return position


def _measurements(run: Run, position: Position, losses: Mapping[str, Tensor], norm: float | Tensor) -> dict[str, float]:
    """A line of the log: the same numbers whenever the run reaches this step."""
    line: dict[str, float] = {"step": position.step, "rate": run.settings.rate(position.step - 1)}
    if losses:
        line |= {"norm": float(norm), **_floats(losses)}
    if run.ema is not None:
        line["ema gap"] = run.ema.gap(run.masters.exact)
    if position.skipped:
        line["skipped"] = len(position.skipped)
    return line


def _result(run: Run, position: Position) -> Result:
    last = {name: tensor.clone() for name, tensor in weights(run).items()}
    means = {name: tensor.clone() for name, tensor in (averages(run) or {}).items()}
    reason: Literal["steps", "patience", "stopped"] = "stopped"
    if position.step >= run.settings.steps:
        reason = "steps"
    elif position.without_patience(run.settings):
        reason = "patience"
    return Result(position.step, reason, {**last, **means}, last, tuple(step for _, step in position.best))


def _print_note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)


def _floats(losses: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in losses.items()}

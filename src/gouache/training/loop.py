"""The training loop, the same for every objective.

    settings, objective, batches -> begin or resume -> per step: losses, gradients, optimizer, average -> checkpoints

The body of `train` is the main pipeline of training. It knows no network and no data.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Container, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from gouache.errors import TrainingError, printable
from gouache.training import nonfinite
from gouache.training import state as checkpoint
from gouache.training.distributed import ALONE, World
from gouache.training.evaluation import Validate, evaluating, measure
from gouache.training.interrupt import requests
from gouache.training.objective import Objective
from gouache.training.position import Position
from gouache.training.recorder import Progress, Recorder
from gouache.training.retention import Saves
from gouache.training.settings import Settings
from gouache.training.snapshot import Run, averaged, averages, begin, fault, is_finite, reader, restore, weights
from gouache.training.step import Batches, accumulate_gradients, clip_gradients, update


@dataclass(frozen=True)
class Result:
    """A run that has ended at `step`, because it was `finished` or stopped.

    `reason` is "steps" if all were done, "patience" if validation did not improve, or "stopped". `last` are the weights
    that its checkpoints contain (trained parameters, and frozen ones if the objective names no base); `weights` are the
    same with averages where they are kept. `best` are the steps with the lowest validation losses, the lowest first;
    their checkpoints are kept. `signal` is the number of the signal that stopped it, 0 if none did.
    """

    step: int
    reason: Literal["steps", "patience", "stopped"]
    weights: Mapping[str, Tensor]
    last: Mapping[str, Tensor]
    best: tuple[int, ...] = ()
    signal: int = 0

    @property
    def finished(self) -> bool:
        return self.reason != "stopped"


def train(
    objective: Objective,
    batches: Batches,
    settings: Settings,
    folder: Path,
    *,
    on_begin: Callable[[Position], None] | None = None,
    on_log: Callable[[Progress], None] | None = None,
    validate: Validate | None = None,
    on_preview: Callable[[int], None] | None = None,
    on_last_preview: Callable[[int], None] | None = None,
    on_return: Callable[[int], None] | None = None,
    preview_steps: Container[int] = (),
    should_stop: Callable[[], bool] | None = None,
    seconds: float = math.inf,
    on_note: checkpoint.OnNote | None = None,
    epoch_batches: int = 0,
    lock: bool = True,
    world: World = ALONE,
) -> Result:
    """Train until `settings.steps`, for `seconds`, or until Ctrl-C or `should_stop()`; then save. A later call resumes.

    `folder` contains the checkpoints and the logs. `on_begin` is called with the position of the run, once the
    folder is locked and a checkpoint, if there is one, is restored. `validate` and `on_preview` are called with the
    averaged weights in the networks: `validate` every `settings.validate_steps`, and once more with the last weights;
    `on_preview` with the number of steps done, for the numbers in `preview_steps` (0 is before the first step; an
    interval is a `range`); `on_last_preview` likewise with the last weights, if there are averages and a step was done.
    `on_return` is called with the step that the run returned to when a later one broke the weights.
    `should_stop` is polled between steps; it is for callers outside the main thread, where no signal arrives. A
    checkpoint is saved at once when SIGUSR1 or a file `save-now` in `folder` asks for it. `on_note` receives lines such
    as "step-00000003 is damaged ..."; without it they are printed on stderr. `epoch_batches` is the number of batches
    per epoch, for `settings.save_epochs`. `lock` False: the caller has locked the folder (`state.locked`).

    With several processes in `world`, each calls this with its part of the batches and the same folder. The gradients
    are averaged; what one of them is asked for, all do. Only the main process writes, reports and calls `on_begin`,
    `on_log`, `on_note` and `on_return`; `validate` and the previews are called in all of them.

    Raises TrainingError when a loss or gradient is not finite and `settings.not_finite` is "stop", when another run
    trains in the folder, when the folder belongs to a different run, or when its disk is full; RequestError when the
    optimizer or the schedule is not known.
    """
    note = (on_note or _print_note) if world.is_main else _ignore
    locks = lock and world.is_main
    with checkpoint.locked(folder) if locks else nullcontext(), requests(folder, world) as requested:
        run = begin(objective, settings, world)
        position = _resume(run, folder, note)
        saves = Saves(run, folder, position.step, epoch_batches)
        record = Recorder(run, folder, position.step, on_log, note)
        batches = record.clock.measured("data", batches)
        if on_begin is not None and world.is_main:
            on_begin(position)

        def running() -> bool:
            stopped = requested.stop or record.seconds >= seconds or (should_stop is not None and should_stop())
            return not world.any(stopped) and position.step < settings.steps and not position.without_patience(settings)

        def preview() -> None:
            if on_preview is None or position.step not in preview_steps:
                return
            with record.clock.measure("previews"), evaluating(objective.networks):
                with averaged(run) as are_others:
                    on_preview(position.step)
                if are_others and position.step and on_last_preview is not None:
                    on_last_preview(position.step)

        def skip_step(losses: Mapping[str, Tensor]) -> None:
            if settings.not_finite == "stop" and is_finite(run):
                saves.save(position)  # what was trained so far is good
            note(nonfinite.skip(run, position, folder, saves.step, batches, losses))
            record.return_to(position.step)
            if on_return is not None and world.is_main:
                on_return(position.step)

        def save() -> None:
            if not is_finite(run):
                skip_step({})
                return
            with record.clock.measure("saving"):
                record.saved(saves.save(position))

        if position.step == 0:
            preview()
        while running():
            losses, norm = {}, 0.0
            if position.step not in position.skipped:
                losses = accumulate_gradients(run, batches, position.number)
                norm = clip_gradients(run)
                if not nonfinite.step_is_finite(losses, norm):
                    skip_step(losses)
                    continue
                update(run, position.step)
            position.advance(settings)
            record.step(position, losses, norm)

            is_among_best = False
            if validate is not None and settings.is_due(position.step, settings.validate_steps):
                with record.clock.measure("validation"):
                    scores = measure(run, validate)
                record.validation(position, scores)
                is_among_best = position.validated(scores["loss"], settings)
            preview()
            if world.any(is_among_best or saves.due(position) or requested.saving()):
                save()
            record.times(position)

        save()
        return _result(run, position, int(world.highest(requested.signal)[0]))


# With other values of these, validation losses cannot be compared.
_MEASURED = ("objective.validation", "objective.timesteps")


def _resume(run: Run, folder: Path, on_note: checkpoint.OnNote) -> Position:
    """Restore the newest undamaged checkpoint, if there is one."""
    state, is_main = checkpoint.newest(folder, fault=fault, on_note=on_note, read=reader(run)), run.world.is_main
    _check_shared(run.world, folder, None if state is None else state.step)
    if state is None:
        if is_main:
            checkpoint.start_over(folder, on_note)
        return Position()
    position = restore(run, state, folder)
    if any(change.setting in _MEASURED and change.step == position.step for change in run.changes):
        if position.best or math.isfinite(position.lowest):
            on_note("other pictures or timesteps are validated than before: the lowest loss is looked for anew")
        position.forget_validation()
    run.world.barrier()  # all have read it
    if is_main:
        checkpoint.set_aside(folder, after=position.step)
    return position


def _check_shared(world: World, folder: Path, step: int | None) -> None:
    """Raises TrainingError unless all processes have found the same checkpoint."""
    found = world.all_of(step)
    if other := next((rank for rank, each in enumerate(found) if each != found[0]), 0):
        names = ["no checkpoint" if each is None else f"that of step {each}" for each in (found[0], found[other])]
        raise TrainingError(
            f"{printable(str(folder))}: process 0 finds {names[0]} and process {other} {names[1]}; all machines must "
            "share the folder of the run"
        )


def _result(run: Run, position: Position, signal: int) -> Result:
    means = dict(averages(run) or {})  # nothing changes them any more
    run.optimizer.state.clear()  # its memory is more than that of the copies
    last = {name: tensor.clone() for name, tensor in weights(run).items()}
    reason: Literal["steps", "patience", "stopped"] = "stopped"
    if position.step >= run.settings.steps:
        reason = "steps"
    elif position.without_patience(run.settings):
        reason = "patience"
    best = tuple(step for _, step in position.best)
    return Result(position.step, reason, {**last, **means}, last, best, signal)


def _ignore(line: str) -> None:
    pass


def _print_note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)

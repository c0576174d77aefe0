"""The training loop: one for every objective.

    settings, objective, batches -> resume or start -> per step: losses, gradients, optimizer, average -> checkpoints

The body of `train` is the second straight line of the house. It knows no network and no data.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gouache.errors import TrainingError
from gouache.training import state as checkpoint
from gouache.training.ema import Ema
from gouache.training.objective import Group, Objective
from gouache.training.settings import Settings

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
    """How a run ended: at `step`, `finished` or stopped, with the averages (the weights, where none are kept)."""

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
    checkpoint of the lowest "loss" it returned is kept as `best.safetensors`. Raises TrainingError when a loss is
    not finite, or when the folder belongs to a run of other settings.
    """
    with checkpoint.locked(folder), _stop_signals() as stopped:
        groups = objective.groups()
        parameters = {name: parameter for group in groups for name, parameter in group.parameters.items()}
        optimizer = _optimizer(groups, settings)
        ema = Ema(parameters, settings.ema_decay) if settings.ema_decay else None
        step, best = _resume(folder, objective, parameters, optimizer, ema, settings)

        began = saved = time.monotonic()
        first = step
        log = _Log(folder / "log.jsonl", step)
        while step < settings.steps and not stopped() and time.monotonic() - began < seconds:
            for part in range(settings.accumulate):
                number = step * settings.accumulate + part
                losses = objective.losses(batches(number), number)
                (losses["loss"] / settings.accumulate).backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip_norm)
            if not torch.isfinite(norm):
                raise TrainingError(
                    f"step {step}: the gradient is not finite (losses {_floats(losses)}); "
                    f"{folder} still holds the last good checkpoint: lower the learning rate and go on from it"
                )
            for group, described in zip(optimizer.param_groups, groups):
                group["lr"] = settings.rate(step) * described.rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema.update(parameters)
            step += 1

            if step % settings.log_steps == 0 or step == settings.steps:
                passed = time.monotonic() - began
                left = passed / (step - first) * (settings.steps - step)
                told = Progress(step, settings.steps, _floats(losses), passed, left)
                log.write(step=step, rate=settings.rate(step - 1), norm=float(norm), **told.losses)
                if on_log is not None:
                    on_log(told)
            if validate is not None and (step % settings.validate_steps == 0 or step == settings.steps):
                with _averaged(parameters, ema):
                    scores = dict(validate())
                    log.write(step=step, **{f"validation {name}": value for name, value in scores.items()})
                    if scores["loss"] < best:
                        best = scores["loss"]
                        checkpoint.write_tensors(folder / "best.safetensors", _weights(objective))
            if time.monotonic() - saved > settings.save_seconds:
                checkpoint.save(folder, _state(step, best, objective, optimizer, ema, settings), settings.keep)
                saved = time.monotonic()

        if step > first:
            checkpoint.save(folder, _state(step, best, objective, optimizer, ema, settings), settings.keep)
        last = {name: tensor.clone() for name, tensor in _weights(objective).items()}
        with _averaged(parameters, ema):
            weights = {name: tensor.clone() for name, tensor in _weights(objective).items()}
        return Result(step, step >= settings.steps, weights, last)


def _optimizer(groups: list[Group], settings: Settings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [
            {
                "params": list(group.parameters.values()),
                "weight_decay": settings.weight_decay if group.decay else 0.0,
            }
            for group in groups
        ],
        lr=settings.learning_rate,
        betas=settings.betas,
    )


def _weights(objective: Objective) -> dict[str, Tensor]:
    """All weights of the networks, trained or not, by network and name."""
    return {
        f"{name}.{key}": tensor.detach()
        for name, network in objective.networks.items()
        for key, tensor in network.state_dict().items()
    }


def _state(
    step: int, best: float, objective: Objective, optimizer: torch.optim.Optimizer, ema: Ema | None, settings: Settings
) -> checkpoint.State:
    moments = {
        f"{index}.{name}": value
        for index, moment in optimizer.state_dict()["state"].items()
        for name, value in moment.items()
    }
    tensors = {"weights": _weights(objective), "optimizer": moments}
    if ema is not None:
        tensors["ema"] = ema.weights
    values = {
        "step": step,
        "best": best if math.isfinite(best) else None,
        "ema_updates": ema.updates if ema is not None else 0,
        "settings": settings.model_dump(mode="json"),
    }
    return checkpoint.State(tensors, values)


def _resume(
    folder: Path,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    settings: Settings,
) -> tuple[int, float]:
    """Put the newest checkpoint, if any, in place; returns its step and the best validation loss so far."""
    state = checkpoint.newest(folder)
    if state is None:
        return 0, math.inf
    # The length of the run and how often it is saved may change; what the numbers depend on may not.
    free = {"steps", "log_steps", "validate_steps", "save_seconds", "keep"}
    now = settings.model_dump(mode="json", exclude=free)
    then = {name: value for name, value in state.values["settings"].items() if name not in free}
    if now != then:
        changed = sorted(name for name in now if now[name] != then.get(name))
        raise TrainingError(
            f"{folder}: holds a run with other {', '.join(changed)} "
            f"({', '.join(f'{name} {then.get(name)}' for name in changed)}); keep those, or give another folder"
        )
    weights = _weights(objective)
    stored = state.tensors["weights"]
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in stored.items()}:
        raise TrainingError(f"{folder}: holds a run of other networks; give another folder")
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(stored[name])
    if ema is not None:
        ema.updates = state.values["ema_updates"]
        for name, tensor in state.tensors["ema"].items():
            ema.weights[name].copy_(tensor)
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in state.tensors["optimizer"].items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    best = state.values["best"]
    return state.step, math.inf if best is None else best


@contextmanager
def _averaged(parameters: Mapping[str, nn.Parameter], ema: Ema | None) -> Iterator[None]:
    """The averages in the networks for a while, then the weights again."""
    if ema is None:
        yield
        return
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(ema.weights[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM once: finish the step, save, return. Ctrl-C again: stop at once; the last save stands."""
    asked = False

    def note(_signal: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        before = {name: signal.signal(name, note) for name in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs the loop there stops it by `seconds`
        before = {}
    try:
        yield lambda: asked
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


class _Log:
    """One JSON object a line; on resuming, lines of steps that are to be done again are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            path.write_text("".join(f"{line}\n" for line in lines))

    def write(self, **values: float) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the last line of a killed run may be cut
        return math.inf


def _floats(losses: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in losses.items()}

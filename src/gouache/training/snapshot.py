"""Between a live run and its checkpoint: what is taken out of networks and optimizer, and how it is put back.

Names, never positions, say where a tensor belongs. A checkpoint that does not fit the run in every name and shape is
refused before anything is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gouache.errors import TrainingError
from gouache.training.ema import Ema
from gouache.training.objective import Objective
from gouache.training.settings import Settings
from gouache.training.state import State

# How long a run is and how often it tells or saves may change between sittings; what its numbers depend on may not.
# Under a cosine schedule, other `steps` bend the rates that are still to come.
FREE = frozenset({"steps", "log_steps", "validate_steps", "save_seconds", "keep"})


@dataclass(frozen=True)
class Run:
    """Everything that a step changes, and the settings by which it does. `parameters` are the trained ones."""

    networks: Mapping[str, nn.Module]
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    ema: Ema | None
    settings: Settings


def begin(objective: Objective, settings: Settings) -> Run:
    """A run at its first step."""
    groups = objective.groups()
    parameters = {name: parameter for group in groups for name, parameter in group.parameters.items()}
    optimizer = torch.optim.AdamW(
        [
            {
                "params": list(group.parameters.values()),
                "weight_decay": settings.weight_decay if group.decay else 0.0,
                "rate": group.rate,
            }
            for group in groups
        ],
        lr=settings.learning_rate,
        betas=settings.betas,
        fused=True,  # all parameters at once: of a small network's step on a CPU, one by one costs a tenth
    )
    ema = Ema(parameters, settings.ema_decay) if settings.ema_decay else None
    return Run(objective.networks, parameters, optimizer, ema, settings)


def weights(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """All weights, trained or not, as `network.name`: the tensors themselves, not copies."""
    return {
        f"{name}.{key}": tensor.detach()
        for name, network in networks.items()
        for key, tensor in network.state_dict().items()
    }


def take(run: Run, step: int, best: float) -> State:
    """The run after `step` steps, its lowest validation loss being `best`; valid until the next step."""
    tensors: dict[str, Mapping[str, Tensor]] = {
        "weights": weights(run.networks),
        "optimizer": {
            f"{name}.{moment}": value
            for name, parameter in run.parameters.items()
            for moment, value in run.optimizer.state.get(parameter, {}).items()
        },
    }
    if run.ema is not None:
        tensors["ema"] = run.ema.weights
    values = {
        "step": step,
        "best": best if math.isfinite(best) else None,
        "ema_updates": run.ema.updates if run.ema is not None else 0,
        "settings": run.settings.model_dump(mode="json"),
    }
    return State(tensors, values)


@torch.no_grad()
def put_back(run: Run, state: State, folder: Path) -> tuple[int, float]:
    """Make `run` what it was when `state` was taken; returns its step and lowest validation loss.

    Raises TrainingError, naming `folder` and what differs, if the state is that of another run.
    """
    _refuse_other_settings(run.settings, state.values["settings"], folder)
    live = weights(run.networks)
    averages = run.ema.weights if run.ema is not None else {}
    stored_averages = state.tensors.get("ema", {})
    moments = _moments(state.tensors["optimizer"], list(run.parameters))
    _refuse_other_tensors(live, state.tensors["weights"], "networks", folder)
    _refuse_other_tensors(averages, stored_averages, "averages", folder)
    if strange := sorted(set(moments) - set(run.parameters)):
        raise TrainingError(f"{folder}: holds a run that trained {strange[0]}, which is not trained now; {_WAYS_OUT}")
    for name, stored in moments.items():
        shaped = {moment: value for moment, value in stored.items() if moment != "step"}
        _refuse_other_tensors(dict.fromkeys(shaped, run.parameters[name]), shaped, f"moments of {name}", folder)

    for name, tensor in live.items():
        tensor.copy_(state.tensors["weights"][name])
    for name, tensor in averages.items():
        tensor.copy_(stored_averages[name])
    if run.ema is not None:
        run.ema.updates = state.values["ema_updates"]
    for name, stored in moments.items():
        parameter = run.parameters[name]
        run.optimizer.state[parameter] = {
            moment: value.clone() if moment == "step" else _laid_out_like(parameter, value)
            for moment, value in stored.items()
        }
    best = state.values["best"]
    return state.step, math.inf if best is None else best


@contextmanager
def averaged(run: Run) -> Iterator[None]:
    """The averages in the networks for a while, then the weights again."""
    if run.ema is None:
        yield
        return
    kept = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
    _copy(run.ema.weights, run.parameters)
    try:
        yield
    finally:
        _copy(kept, run.parameters)


_WAYS_OUT = "go on with what it was, or give another folder"


def _refuse_other_settings(now: Settings, stored: Mapping[str, Any], folder: Path) -> None:
    # A setting that is younger than the checkpoint had its default's effect then.
    defaults = {name: field.default for name, field in Settings.model_fields.items() if not field.is_required()}
    then = {**defaults, **stored}
    values = now.model_dump(mode="json")
    changed = [name for name in sorted({*values, *then} - FREE) if _plain(values.get(name)) != _plain(then.get(name))]
    if changed:
        told = ", ".join(f"{name} {then.get(name)} (now {values.get(name)})" for name in changed)
        raise TrainingError(f"{folder}: holds a run with {told}; {_WAYS_OUT}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _refuse_other_tensors(now: Mapping[str, Tensor], then: Mapping[str, Tensor], what: str, folder: Path) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in now.items()}
    stored = {name: list(tensor.shape) for name, tensor in then.items()}
    for name in sorted({*shapes, *stored}):
        if shapes.get(name) != stored.get(name):
            found, wanted = (each.get(name, "absent") for each in (stored, shapes))
            raise TrainingError(f"{folder}: holds a run of other {what}: {name} is {found}, now {wanted}; {_WAYS_OUT}")


def _moments(stored: Mapping[str, Tensor], names: list[str]) -> dict[str, dict[str, Tensor]]:
    """The optimizer's tensors by parameter. Format 1 numbered the parameters; since then their names are written."""
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in stored.items():
        name, _, moment = key.rpartition(".")
        if name.isdecimal() and int(name) < len(names):
            name = names[int(name)]
        moments.setdefault(name, {})[moment] = value
    return moments


def _laid_out_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A copy of `value` in the memory order of `parameter`, as the optimizer itself made it.

    Over mixed orders kernels are slower, and free to round differently: a resumed run is to be equal to the last bit.
    """
    return torch.empty_like(parameter).copy_(value)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in target.items():
        parameter.copy_(source[name])

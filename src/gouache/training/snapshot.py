"""Between a live run and its checkpoint: `capture` reads networks and optimizer, `restore` writes them.

Tensors are matched by name, never by position. A checkpoint that does not fit the run in every name, shape and setting
is refused before anything is changed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gouache.errors import TrainingError, printable
from gouache.training import optimizers, sharded_state, sharding
from gouache.training.changes import Change, as_json, compare, field_defaults, refused
from gouache.training.distributed import ALONE, World
from gouache.training.ema import Ema
from gouache.training.objective import Group, Json, Objective
from gouache.training.optimizers import OptimizerState
from gouache.training.position import Position, position_fault, read_position
from gouache.training.rounding import Masters
from gouache.training.settings import Settings
from gouache.training.sharded_state import Read
from gouache.training.state import State


@dataclass(frozen=True)
class Run:
    """Everything that a step changes, and the settings that determine how.

    `parameters` are the trained ones, `masters` the tensors that the optimizer changes in their place. `options` are
    the optimizer's options as it was built, `buffers` the hashes of the networks' persistent buffers before the first
    step, `changes` the settings changed since the run began, `world` the processes that train together. Of `sharded`
    parameters, by name, each process has a part: `parameters` and everything else of the run are such parts.
    """

    objective: Objective
    parameters: Mapping[str, nn.Parameter]
    masters: Masters
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    settings: Settings
    config: Mapping[str, Json]
    options: Sequence[Mapping[str, Any]]
    buffers: Mapping[str, str]
    changes: list[Change] = field(default_factory=list)
    world: World = ALONE
    sharded: Mapping[str, nn.Parameter] = field(default_factory=dict)


def begin(objective: Objective, settings: Settings, world: World = ALONE) -> Run:
    """A run at its first step. Raises TrainingError if no parameter is trained, or not the same in all processes."""
    groups = [group for group in objective.parameter_groups() if group.parameters]
    parameters = {name: parameter for group in groups for name, parameter in group.parameters.items()}
    if not parameters:
        raise TrainingError("nothing to train: no parameter requires a gradient; unfreeze a network or pass groups")
    if len(parameters) < sum(len(group.parameters) for group in groups):
        raise TrainingError("two trained parameters have the same name; give each a unique name in its group")
    settings.rate(0)  # refuses a schedule that cannot be imported before anything is computed
    sharded = {name: each for name, each in parameters.items() if sharding.is_sharded(each)}
    parameters = {name: sharding.local(each) for name, each in parameters.items()}
    masters = Masters(parameters, settings.rounding)
    own = [replace(group, parameters={name: masters.tensors[name] for name in group.parameters}) for group in groups]
    optimizer = optimizers.build(settings, own)
    averages = settings.ema_decay and not optimizers.is_schedule_free(optimizer)
    ema = Ema(masters.exact, settings.ema_decay, settings.ema_on_cpu) if averages else None
    config = as_json({**objective.config(), "groups": [_describe(group) for group in groups]})
    buffers = {name: _digest(buffer) for name, buffer in _buffers(objective.networks).items()}
    options = optimizers.options(optimizer)
    run = Run(objective, parameters, masters, optimizer, ema, settings, config, options, buffers, [], world, sharded)
    _check_equal(run)
    return run


def weights(run: Run) -> dict[str, Tensor]:
    """The weights that belong in a file of this run: the tensors themselves, not copies.

    These are the trained parameters and the persistent buffers that have changed. Frozen weights are included only
    when the objective names no base they could be loaded from.
    """
    return {**run.masters.exact, **{name: tensor.detach() for name, tensor in _others(run).items()}}


def is_finite(run: Run) -> bool:
    """Whether all trained weights are finite."""
    return not run.world.any(any(not bool(torch.isfinite(tensor).all()) for tensor in run.masters.exact.values()))


def averages(run: Run) -> Mapping[str, Tensor] | None:
    """The averages of the trained weights, None if there are none.

    A schedule-free optimizer has averages of its own, which it swaps with the weights it trains; swapping back is not
    exact, so the weights are put back from copies.
    """
    if run.ema is not None:
        return run.ema.weights
    if not optimizers.is_schedule_free(run.optimizer):
        return None
    optimizer: Any = run.optimizer
    run.masters.load()
    last = _copies(run.masters.tensors)
    optimizer.eval()
    means = _copies(run.masters.tensors)
    optimizer.train()
    _copy(last, run.masters.tensors)
    return means


def capture(run: Run, position: Position) -> State:
    """The run at `position`; valid until the next step."""
    optimizer = optimizers.capture(run.optimizer, run.masters.tensors, run.options)
    tensors: dict[str, Mapping[str, Tensor]] = {"weights": weights(run), "optimizer": optimizer.tensors}
    if (means := averages(run)) is not None:
        tensors["ema"] = means
    values = {
        **position.values(),
        "ema_updates": run.ema.updates if run.ema is not None else 0,
        "settings": run.settings.model_dump(mode="json"),
        "objective": dict(run.config),
        "changes": [asdict(change) for change in run.changes],
        "processes": run.world.size,
        "optimizer": {"values": optimizer.values, "groups": optimizer.groups},
    }
    return State(tensors, values)


def fault(state: State) -> str:
    """What `state` lacks of a run's checkpoint; "" if it has everything that `restore` reads."""
    values = state.values
    for name in ("weights", "optimizer"):
        if name not in state.tensors:
            return f"{name}.safetensors is missing"
    for name, kind in (("settings", dict), ("ema_updates", int), ("processes", int)):
        if not isinstance(values.get(name, 1 if name == "processes" else None), kind):
            return f"state.json has no valid {name!r}"
    if name := position_fault(values):
        return f"state.json has no valid {name!r}"
    rest, changes = values.get("optimizer", {}), values.get("changes", [])
    known = {each.name for each in fields(Change)}
    if not isinstance(rest, dict) or not isinstance(rest.get("values", {}), dict):
        return "state.json has no valid 'optimizer'"
    if not isinstance(changes, list) or not all(isinstance(each, dict) and each.keys() == known for each in changes):
        return "state.json has no valid 'changes'"
    if "objective" in values and not isinstance(values["objective"], dict):
        return "state.json has no valid 'objective'"
    return ""


def estimated_bytes(run: Run) -> int:
    """The size of a checkpoint. Of an optimizer without state yet it assumes two float32 moments per weight."""
    trained = run.masters.exact.values()
    moments = [tensor for state in run.optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)]
    optimizer = _bytes(moments) or sum(8 * tensor.numel() for tensor in trained)
    processes = run.world.size if run.sharded else 1
    has_averages = run.ema is not None or optimizers.is_schedule_free(run.optimizer)
    averages = has_averages * sum(4 * tensor.numel() for tensor in trained)
    return processes * (_bytes(weights(run).values()) + optimizer + averages)


@torch.no_grad()
def restore(run: Run, state: State, folder: Path) -> Position:
    """Make `run` what it was when `state` was captured; returns its position.

    Settings that may change are taken from `run`, and their changes are added to `run.changes`. Raises TrainingError,
    naming `folder` and each difference, if the state belongs to another run.
    """
    changes = _changes(run, state)
    wrong = [change for change in refused(changes, _changeable(run)) if not _RATE_OF_GROUP.fullmatch(change.name)]
    _refuse([change for change in wrong if change.setting != "objective.groups"], folder)
    stored, means, moments = _check_tensors(run, state, folder)
    _refuse(wrong, folder)

    live = _all_tensors(run)
    for name, tensor in stored.items():
        live[name].copy_(tensor)
    run.masters.restore(stored)
    if run.ema is not None:
        run.ema.start(means or run.masters.exact)
        run.ema.updates = state.values["ema_updates"] if means else 0
    run.optimizer.state.clear()
    for group, initial in zip(run.optimizer.param_groups, run.options, strict=True):
        group.update(initial)
    if not any(change.setting in ("settings.optimizer", "settings.optimizer_arguments") for change in changes):
        rest = state.values.get("optimizer", {})
        own = OptimizerState(moments, rest.get("values", {}), rest.get("groups", ()))
        optimizers.restore(run.optimizer, run.masters.tensors, own)
    run.changes[:] = [*(Change(**change) for change in state.values.get("changes", ())), *changes]
    accumulate = next((each.before for each in changes if each.name == "settings.accumulate"), run.settings.accumulate)
    return read_position(state.values, int(accumulate))  # type: ignore[arg-type]


def reader(run: Run) -> Read:
    """Reads of a checkpoint's tensors what this process has of them."""
    return sharded_state.reader(run.sharded, run.world.rank, run.world.size)


@contextmanager
def averaged(run: Run) -> Iterator[bool]:
    """Within the block, the networks have the averaged weights; afterwards the last weights again.

    Yields whether there are averages; without them nothing changes.
    """
    means = averages(run)
    if means is None:
        yield False
        return
    last = _copies(run.parameters)
    _copy(means, run.parameters)
    try:
        yield True
    finally:
        _copy(last, run.parameters)


PROCESSES = "run.processes"
"""The number of processes among the changes of a run."""

_ADVICE = "resume with the original values, or use another folder"
_RATE_OF_GROUP = re.compile(r"objective\.groups\.\d+\.(rate|decay)")  # may change, unlike what is trained


def _changes(run: Run, state: State) -> list[Change]:
    defaults = {name: each.default for name, each in Settings.model_fields.items() if not each.is_required()}
    settings = run.settings.model_dump(mode="json")
    changes = compare("settings", state.step, state.values["settings"], settings, as_json(defaults))
    if "objective" in state.values:  # not in formats 1 and 2
        before = state.values["objective"]
        changes += compare("objective", state.step, before, run.config, field_defaults(run.objective))
    if (processes := state.values.get("processes", 1)) != run.world.size:
        changes.append(Change(state.step, PROCESSES, processes, run.world.size))
    return changes


def _check_equal(run: Run) -> None:
    """Raises TrainingError unless all processes have the settings and the configuration of the first one."""
    values: dict[str, Json] = {"settings": run.settings.model_dump(mode="json"), "objective": dict(run.config)}
    if differences := compare("process", 0, run.world.of_main(values), values, {}):
        shown = ", ".join(change.text for change in differences[:3])
        raise TrainingError(
            f"process {run.world.rank} differs from process 0 in {shown}; start all with the same settings, model, "
            "pictures and version of Gouache"
        )


def _changeable(run: Run) -> frozenset[str]:
    settings = {f"settings.{name}" for name in run.settings.changeable}
    return frozenset(settings | {f"objective.{name}" for name in run.objective.changeable} | {PROCESSES})


def _refuse(changes: Sequence[Change], folder: Path) -> None:
    if changes:
        shown = printable(str(folder))
        # The hash of the layout differs with everything that changes it, which says more.
        telling = [each for each in changes if not each.name.endswith(".layout")] or changes
        texts = [each.text for each in telling if each.setting != "objective.groups"]
        if len(texts) < len(telling):
            texts.append("other groups of parameters (adapter.rates names other parts or blocks now)")
        raise TrainingError(f"{shown}: was trained with {', '.join(texts)}; {_ADVICE}")


def _check_tensors(
    run: Run, state: State, folder: Path
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]]:
    """(weights, averages, optimizer tensors) of `state`. Raises TrainingError unless all names and shapes fit."""
    stored = state.tensors["weights"]
    means = state.tensors.get("ema", {}) if run.ema is not None else {}
    moments = _named(state.tensors["optimizer"], list(run.parameters))
    live = _all_tensors(run)
    old = "objective" not in state.values  # formats 1 and 2: all weights, an optimizer that was AdamW
    optional = set(live if old else run.buffers) & set(stored)
    expected = {*run.parameters, *_others(run), *optional}
    _check_shapes({name: live[name] for name in expected}, stored, "weights", folder)
    if run.ema is not None and means:
        _check_shapes(run.ema.weights, means, "averages", folder)
    owners = {name.rpartition(".")[0] for name in moments} | set(state.values.get("optimizer", {}).get("values", {}))
    if unknown := sorted(owners - set(run.parameters)):
        shown, name = printable(str(folder)), printable(unknown[0])
        raise TrainingError(f"{shown}: {name} was trained there and is not trained now; {_ADVICE}")
    if old:  # in format 1 the order of the parameters might be another one
        moments_now = {path: live[path.rpartition(".")[0]] for path in moments if not path.endswith(".step")}
        _check_shapes(moments_now, {path: moments[path] for path in moments_now}, "moments", folder)
    return stored, means, moments


def _check_shapes(now: Mapping[str, Tensor], stored: Mapping[str, Tensor], what: str, folder: Path) -> None:
    here = {name: list(tensor.shape) for name, tensor in now.items()}
    there = {name: list(tensor.shape) for name, tensor in stored.items()}
    for name in sorted({*here, *there}):
        if here.get(name) != there.get(name):
            found, expected = (str(shapes.get(name, "absent")) for shapes in (there, here))
            raise TrainingError(
                f"{printable(str(folder))}: the {what} do not fit: {printable(name)} is {found} in the checkpoint, "
                f"{expected} now; {_ADVICE}"
            )


def _named(stored: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The optimizer's tensors as `parameter.key`. Format 1 numbered the parameters; newer formats name them."""
    named: dict[str, Tensor] = {}
    for path, value in stored.items():
        name, _, key = path.rpartition(".")
        if name.isdecimal() and int(name) < len(names):
            name = names[int(name)]
        named[f"{name}.{key}"] = value
    return named


def _all_tensors(run: Run) -> dict[str, Tensor]:
    """The trained parameters and all persistent tensors of the networks."""
    return {**_state(run.objective.networks), **run.parameters}


def _others(run: Run) -> dict[str, Tensor]:
    """Tensors that are not trained and belong in a checkpoint nevertheless."""
    if run.config.get("base") is not None:
        buffers = _buffers(run.objective.networks)
        return {name: buffer for name, buffer in buffers.items() if run.buffers.get(name) != _digest(buffer)}
    trained = {id(parameter) for parameter in (*run.parameters.values(), *run.sharded.values())}
    return {name: tensor for name, tensor in _state(run.objective.networks).items() if id(tensor) not in trained}


def _state(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """All persistent tensors as `network.name`: the parameters and buffers themselves."""
    return {
        f"{name}.{key}": tensor
        for name, network in networks.items()
        for key, tensor in network.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }


def _buffers(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in _state(networks).items() if not isinstance(tensor, nn.Parameter)}


def _digest(tensor: Tensor) -> str:
    """A hash of the values; torch's own version numbers miss the changes that fused batch norms make."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def _describe(group: Group) -> dict[str, Json]:
    names = "\n".join(sorted(group.parameters))
    digest = hashlib.sha256(names.encode()).hexdigest()[:16]
    return {"parameters": len(group.parameters), "names": digest, "rate": group.rate, "decay": group.decay}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in target.items():
        parameter.copy_(source[name])

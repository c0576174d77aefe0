"""Checkpoints of other trainers (PyTorch Lightning): weights, averages, optimizer moments and step, to be continued.

Lightning stores {"state_dict", "optimizer_states", "global_step", ...}. An optimizer's state is numbered in the order
in which its parameters were passed to it. CompVis' and Stability AI's trainers pass the parameters of the U-Net, then
those of the text encoder if it is trained, in the order in which modules were registered: that of `state_dict`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gouache.errors import ModelError, printable
from gouache.families.found import Component, Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.pickle_file import open_pickle
from gouache.files.record import ModelFile
from gouache.training.optimizers import OptimizerState
from gouache.wording import plural

_STATE = re.compile(r"optimizer_states\.(\d+)\.state\.(\d+)\.(\w+)")
_WEIGHTS = "state_dict."


@dataclass(frozen=True)
class Continued:
    """The training state in a foreign checkpoint, under our names (`unet.input_blocks.0.0.weight`).

    `optimizer` has the moments; `averages` are empty without averages (EMA), of which there were `updates`. `notes` are
    lines for the user.
    """

    step: int
    optimizer: OptimizerState
    averages: Mapping[str, Tensor] = field(default_factory=dict)
    updates: int = 0
    notes: tuple[str, ...] = ()


def read(path: Path) -> Continued:
    """The training state in the checkpoint `path`; its weights are loaded as those of any model file.

    Raises ModelError if it has no step or no moments, or these do not fit its weights; FileError if it is damaged.
    """
    name = printable(str(path))
    file = open_model(path)
    step = step_of(file)
    everything = open_pickle(path, everything=True)
    found = identify(file)
    moments = _moments(everything, found)
    if not moments:
        raise ModelError(f"{name} has no moments of the U-Net or a text encoder; start from its weights instead")
    tensors: dict[str, Tensor] = {}
    for component, by_key in moments.items():
        part = found.components[component]
        for key, values in by_key.items():
            for ours, origin in part.origins.items():
                if all(source in values for source in origin.sources):
                    tensors[f"{component}.{ours}.{key}"] = _moment(origin, values)
    averages = {f"unet.{ours}": file.read(theirs).float() for ours, theirs in found.ema_names.items()}
    updates = int(file.read("model_ema.num_updates")) if "model_ema.num_updates" in file else 0
    count = plural(len({path.rpartition(".")[0] for path in tensors}), "weight")
    notes = [f"{name}: goes on from step {step} with the moments of {count}"]
    if averages:
        notes.append(f"{name}: goes on with its averages (EMA) of {updates} updates")
    return Continued(step, OptimizerState(tensors), averages, updates, tuple(notes))


def step_of(file: ModelFile) -> int:
    """The step of a training checkpoint, from its header. Raises ModelError if `file` is none."""
    step = file.extra.get("global_step")
    if file.format == "safetensors" or not isinstance(step, int) or "optimizer_states" not in file.extra:
        raise ModelError(
            f"{printable(str(file.path))} is not a training checkpoint of PyTorch Lightning: it has no global_step and "
            "optimizer_states; start from its weights instead"
        )
    return step


def _moment(origin: Any, values: Mapping[str, Tensor]) -> Tensor:
    first = values[origin.sources[0]]
    return first.float() if first.ndim == 0 else origin.tensor(values.__getitem__).contiguous()


def _moments(file: ModelFile, found: Found) -> dict[str, dict[str, dict[str, Tensor]]]:
    """{component: {key, such as exp_avg: {name in the file: value}}}, checked against the shapes of the weights.

    The names of scalars (`step`) are those of their parameters too.
    """
    name = printable(str(file.path))
    numbered: dict[int, dict[str, Tensor]] = {}
    for stored in file:
        if (match := _STATE.fullmatch(stored)) is not None and match[1] == "0":
            numbered.setdefault(int(match[2]), {})[match[3]] = file.read(stored)
    for stored, value in file.extra.items():  # step was a plain number before torch 1.12
        match = _STATE.fullmatch(stored)
        if match is not None and match[1] == "0" and isinstance(value, int | float) and int(match[2]) in numbered:
            numbered[int(match[2])][match[3]] = torch.tensor(float(value))
    trained = list(_trained(file, found))
    if numbered and max(numbered) >= len(trained):
        raise ModelError(
            f"{name} has moments of {max(numbered) + 1} parameters, but its U-Net and text encoders have "
            f"{len(trained)}; it was trained in another way: start from its weights instead"
        )
    moments: dict[str, dict[str, dict[str, Tensor]]] = {}
    for number, values in numbered.items():
        component, parameter = trained[number]
        shape = file.tensors[_WEIGHTS + parameter].shape
        for key, value in values.items():
            if value.ndim and tuple(value.shape) != shape:
                raise ModelError(
                    f"{name}: {key} number {number} is {list(value.shape)}, but {printable(parameter)} is "
                    f"{list(shape)}; its parameters have another order: start from its weights instead"
                )
            moments.setdefault(component, {}).setdefault(key, {})[parameter] = value
    return moments


def _trained(file: ModelFile, found: Found) -> Iterator[tuple[str, str]]:
    """(component, name in the file) of each weight that the optimizer may have received, in that order."""
    owners: dict[str, str] = {}
    parts = [part for name, part in found.components.items() if name != "vae"]
    for part in sorted(parts, key=lambda part: part.name != "unet"):
        owners |= dict.fromkeys(_sources(part), part.name)
    order = [stored.removeprefix(_WEIGHTS) for stored in file if stored.startswith(_WEIGHTS)]
    for wanted in dict.fromkeys(part.name for part in sorted(parts, key=lambda part: part.name != "unet")):
        yield from ((wanted, stored) for stored in order if owners.get(stored) == wanted)


def _sources(part: Component) -> set[str]:
    return {source for origin in part.origins.values() for source in origin.sources}

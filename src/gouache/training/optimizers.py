"""Optimizers by name, and their state as named tensors and numbers.

`TABLE` has those of torch, `EXTRAS` well-kept ones of packages that need not be installed. Any other class derived
from torch.optim.Optimizer can be given by its dotted path; it is imported, which runs its module's code, so paths
belong only in settings that the user wrote.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gouache.errors import RequestError, TrainingError, printable
from gouache.training.objective import Group
from gouache.training.rates import imported
from gouache.training.settings import Settings


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for matrices and AdamW for all other parameters, as its authors advise.

    Muon's steps are scaled to the size of AdamW's, so that one learning rate fits both. `momentum` and `nesterov` are
    Muon's, `betas` AdamW's.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        momentum: float = 0.95,
        nesterov: bool = True,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"torch {torch.__version__} has no Muon; it needs torch 2.9 or newer")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        split = [
            ({**group, "params": [each for each in group["params"] if each.ndim == 2]},
             {**group, "params": [each for each in group["params"] if each.ndim != 2]})
            for group in self.param_groups
        ]  # fmt: skip
        matrices, others = ([part for part in parts if part["params"]] for parts in zip(*split))
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            muon = {"momentum": momentum, "nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw"}
            self._parts.append(torch.optim.Muon(matrices, **muon))
        if others:
            self._parts.append(torch.optim.AdamW(others, betas=betas, fused=True))
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self.state = defaultdict(dict)
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()


# Fused: all parameters in one kernel. For a small network on a CPU, one by one takes a tenth of the step's time.
TABLE: Mapping[str, tuple[type[torch.optim.Optimizer], Callable[[Settings], dict[str, Any]]]] = {
    "adamw": (torch.optim.AdamW, lambda settings: {"betas": settings.betas, "fused": True}),
    "adam": (torch.optim.Adam, lambda settings: {"betas": settings.betas, "fused": True}),
    "sgd": (torch.optim.SGD, lambda settings: {"fused": True}),
    # torch multiplies the rate by max(eps[1], size of the weights): with 0.001 a LoRA, starting at 0, learns nothing.
    "adafactor": (torch.optim.Adafactor, lambda settings: {"eps": (None, 1.0)}),
    "muon": (MuonWithAdamW, lambda settings: {"betas": settings.betas}),
}

# name: (class, package to install, arguments)
EXTRAS: Mapping[str, tuple[str, str, Callable[[Settings], dict[str, Any]]]] = {
    "adamw8bit": ("bitsandbytes.optim.AdamW8bit", "bitsandbytes", lambda settings: {"betas": settings.betas}),
    "lion": ("lion_pytorch.Lion", "lion-pytorch", lambda settings: {"betas": settings.betas}),
    "prodigy": ("prodigyopt.Prodigy", "prodigyopt", lambda settings: {"betas": settings.betas}),
    "schedule-free": (
        "schedulefree.AdamWScheduleFree", "schedulefree", lambda settings: {"betas": settings.betas}
    ),
}  # fmt: skip

_ONE_RATE = ("prodigyopt", "dadaptation")  # packages whose optimizers refuse groups with different rates


def build(settings: Settings, groups: Sequence[Group]) -> torch.optim.Optimizer:
    """The optimizer `settings.optimizer` for `groups`, in their order; each has its factor under "rate".

    Raises RequestError if the name, the path, the package or an argument is not known, or the optimizer needs equal
    factors and they are not.
    """
    name = settings.optimizer
    make, arguments = _known(name, settings)
    rates = sorted({group.rate for group in groups if group.rate})
    if len(rates) > 1 and make.__module__.partition(".")[0] in _ONE_RATE:
        factors = ", ".join(f"{rate:g}" for rate in rates)
        raise RequestError(
            "optimizer",
            f"{name} estimates one rate for all parts, but their factors are {factors}; "
            "make them equal (parts.text_rate = 1, adapter.plus_ratio = 1, no adapter.rates) or use adamw",
        )
    options = [
        {
            "params": list(group.parameters.values()),
            "weight_decay": settings.weight_decay if group.decay else 0.0,
            "rate": group.rate,
        }
        for group in groups
    ]
    try:
        optimizer: Any = make(options, **{"lr": settings.learning_rate, **arguments, **settings.optimizer_arguments})
    except (TypeError, ValueError, RuntimeError) as error:
        problem = " ".join(str(error).split())
        raise RequestError("optimizer_arguments", f"{name} does not accept these settings: {problem}") from None
    if is_schedule_free(optimizer):
        optimizer.train()
    return optimizer


def is_schedule_free(optimizer: Any) -> bool:
    """Whether the networks have the weights to use only after its `eval()`, and those to train only after `train()`."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer remembers: per parameter tensors `tensors["name.key"]` and other values `values[name][key]`.

    `groups` are the options of each parameter group that the optimizer itself has changed (Prodigy's estimate of the
    rate, for instance), without the learning rate.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    groups: Sequence[Mapping[str, Any]] = ()


def options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The options of each parameter group, without the parameters and the learning rate that the loop sets."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "lr")} for group in optimizer.param_groups
    ]


def capture(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], initial: Sequence[Mapping[str, Any]]
) -> OptimizerState:
    """The state of `optimizer`, whose groups had the options `initial` when it was built; the tensors are not copies.

    Raises TrainingError for state that is neither a tensor nor a plain value.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value.detach()
            else:
                values.setdefault(name, {})[key] = _plain(optimizer, key, value)
    groups = [
        {
            key: _plain(optimizer, key, value)
            for key, value in now.items()
            if key not in then or not _equal(value, then[key])
        }
        for now, then in zip(options(optimizer), initial, strict=True)
    ]
    return OptimizerState(tensors, values, groups)


@torch.no_grad()
def restore(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: OptimizerState) -> None:
    """Give `optimizer` copies of a captured state. The learning rate and all other options are not changed."""
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    restored: dict[str, dict[str, Any]] = {name: dict(values) for name, values in state.values.items()}
    for path, tensor in state.tensors.items():
        name, _, key = path.rpartition(".")
        parameter = parameters[name]
        restored.setdefault(name, {})[key] = _placed(key, tensor, parameter, group_of[id(parameter)])
    for name, values in restored.items():
        optimizer.state[parameters[name]] = values
    for group, changed in zip(optimizer.param_groups, state.groups):
        group.update(changed)


def _known(name: str, settings: Settings) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """(class, its arguments) for a name or a dotted path."""
    if name in TABLE:
        return TABLE[name][0], TABLE[name][1](settings)
    path, arguments = name, {}
    if name in EXTRAS:
        path, package, make_arguments = EXTRAS[name]
        if importlib.util.find_spec(path.partition(".")[0]) is None:
            raise RequestError(
                "optimizer", f"{name} needs the package {package}, which is not installed: pip install {package}"
            )
        arguments = make_arguments(settings)
    found = imported("optimizer", path, f"use {', '.join([*TABLE, *EXTRAS])}, or the dotted path of a class")
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise RequestError("optimizer", f"{printable(path)} is not a class derived from torch.optim.Optimizer")
    return found, arguments


def _placed(key: str, tensor: Tensor, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
    """A copy of stored state, on the device and in the memory format that the optimizer itself would have used.

    With mixed memory formats kernels are slower and may round differently: a resumed run must be bit-equal.
    """
    if key == "step" and tensor.ndim == 0:  # torch keeps step counts on the CPU unless a kernel reads them
        on_device = group.get("fused") or group.get("capturable")
        return tensor.to(parameter.device if on_device else "cpu", copy=True)
    if tensor.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
    return tensor.to(parameter.device, copy=True)


def _plain(optimizer: torch.optim.Optimizer, key: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(optimizer, key, each) for each in value]
    raise TrainingError(
        f"{type(optimizer).__name__} keeps {key} as {type(value).__name__}, which cannot be saved; "
        "use another optimizer"
    )


def _equal(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other))

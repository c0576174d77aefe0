"""The interface between the loop and what it trains: networks, parameter groups, configuration, losses of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

Json = None | bool | int | float | str | list[Any] | dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Parameters that share optimizer settings: `rate` multiplies the learning rate; `decay` enables weight decay.

    The names are those in checkpoints. For a parameter of a network they are `network.name`; other parameters (the
    factors of a LoRA, the vectors of an embedding) may have any name that is unique in the run.
    """

    parameters: Mapping[str, nn.Parameter]
    rate: float = 1.0
    decay: bool = True


class Objective(Protocol):
    """What the loop needs to know of a training objective.

    `changeable` are the names in `config` whose values may differ when a run is resumed.
    """

    changeable: ClassVar[frozenset[str]]

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The trained networks by the name that precedes their weights in checkpoints."""
        ...

    def parameter_groups(self) -> list[Group]:
        """The trained parameters. They need not be all parameters of a network, nor belong to one."""
        ...

    def config(self) -> Mapping[str, Json]:
        """Everything that the losses depend on, apart from weights and batches; stored in every checkpoint.

        A resumed run must have the same values, except for those named in `changeable`. "base" identifies the weights
        that frozen parameters come from: if it is not None, checkpoints do not contain them.
        """
        ...

    def losses(self, batch: Any, number: int, /) -> Mapping[str, Tensor]:
        """Named scalars of batch `number`. "loss" is minimised; the others are only logged.

        Random numbers come from (seed, number) alone, so that the same call gives the same losses.
        """
        ...


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random generator of one step or batch. It depends on seed and number alone: no random state is saved."""
    # Neighbouring steps and seeds are spread far apart: the generator itself mixes similar seeds poorly.
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) % 2**63
    return torch.Generator(device).manual_seed(mixed)


def by_decay(modules: Mapping[str, nn.Module], rate: float = 1.0) -> list[Group]:
    """All trainable parameters in two groups: matrices and filters have weight decay, norms and biases do not."""
    named = {
        f"{name}.{key}": parameter
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    matrices = {name: parameter for name, parameter in named.items() if parameter.ndim > 1}
    vectors = {name: parameter for name, parameter in named.items() if parameter.ndim <= 1}
    return [Group(matrices, rate), Group(vectors, rate, decay=False)]

"""What the loop asks of a thing to be trained: its networks, its parameter groups, and the losses of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Group:
    """Parameters that share a rate: `rate` times the run's learning rate; `decay` says whether weights decay."""

    parameters: Mapping[str, nn.Parameter]
    rate: float = 1.0
    decay: bool = True


class Objective(Protocol):
    """`networks` are saved and averaged under their names; `groups` are what the optimizer moves."""

    @property
    def networks(self) -> Mapping[str, nn.Module]: ...

    def groups(self) -> list[Group]: ...

    def losses(self, batch: Any, step: int) -> Mapping[str, Tensor]:
        """Named scalars of one batch. "loss" is what is descended; the others are told to the log."""
        ...


def chance(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one step. Nothing is remembered between steps, so nothing random needs saving."""
    # Far apart for neighbouring steps and seeds: the generator's own mixing of near seeds is weak.
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) % 2**63
    return torch.Generator(device).manual_seed(mixed)


def by_decay(modules: Mapping[str, nn.Module], rate: float = 1.0) -> list[Group]:
    """All trainable parameters in two groups: matrices and filters decay, norms and biases do not."""
    named = {
        f"{name}.{key}": parameter
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    matrices = {name: parameter for name, parameter in named.items() if parameter.ndim > 1}
    vectors = {name: parameter for name, parameter in named.items() if parameter.ndim <= 1}
    return [Group(matrices, rate), Group(vectors, rate, decay=False)]

"""Dropouts of a trained adapter, drawn from (seed, module, batch number) alone.

So a resumed run has the same ones, and a module that gradient checkpointing evaluates twice has them twice.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gouache.adapters.forms import Parts
from gouache.errors import RequestError
from gouache.layouts.modules import Module
from gouache.training.objective import step_generator

RANK_PARTS = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w2", "oft_blocks")
"""The part whose first dimension counts the ranks of a form: the change is a sum over it. (OFT: its blocks.)"""


@dataclass(frozen=True)
class Rates:
    """Probabilities, from 0 to below 1, with which each batch leaves out something of each module's patch.

    `module`: all of it. `rank`: each of its ranks. `value`: each number that a low-rank form computes between its two
    factors, and each output of other forms. What remains is divided by the probability of remaining, except modules.
    """

    module: float = 0.0
    rank: float = 0.0
    value: float = 0.0

    def __post_init__(self) -> None:
        names = {"module_dropout": self.module, "rank_dropout": self.rank, "dropout": self.value}
        for name, rate in names.items():
            if not 0 <= rate < 1:
                raise RequestError(name, f"is {rate:g}; expected a probability from 0 to below 1")

    @property
    def none(self) -> bool:
        return not (self.module or self.rank or self.value)


def module_generator(seed: int, module: Module, number: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random generator of one module for one batch. It does not depend on which other modules there are."""
    return step_generator(seed + (zlib.crc32("/".join(module).encode()) << 20), number, device)


class ModuleDropout:
    """The dropouts of one module's patch (`adapters.parameters.Dropout`); none before the first `begin_batch`."""

    def __init__(self, rates: Rates, seed: int, module: Module, parts: Mapping[str, Tensor]) -> None:
        self._rates, self._seed, self._module = rates, seed, module
        part = next((name for name in RANK_PARTS if name in parts), None) if rates.rank else None
        self._rank_part = part
        self._ranks = len(parts[part]) if part is not None else 0
        self._number: int | None = None
        self._skips = False
        self._mask: Tensor | None = None

    def begin_batch(self, number: int) -> None:
        generator = module_generator(self._seed, self._module, number)
        self._number = number
        self._skips = bool(torch.rand((), generator=generator) < self._rates.module)
        if self._rank_part is not None:
            self._mask = dropout_mask((self._ranks,), self._rates.rank, generator)

    @property
    def skips(self) -> bool:
        return self._skips

    def of_parts(self, parts: Parts) -> Parts:
        if self._rank_part is None or self._mask is None:
            return parts
        part = parts[self._rank_part]
        return {**parts, self._rank_part: part * self._mask.to(part).reshape(-1, *[1] * (part.ndim - 1))}

    def of_values(self, x: Tensor) -> Tensor:
        if not self._rates.value or self._number is None:
            return x
        generator = module_generator(self._seed + 1, self._module, self._number, x.device)
        return x * dropout_mask(x.shape, self._rates.value, generator).to(x.dtype)


def dropout_mask(shape: tuple[int, ...], rate: float, generator: torch.Generator) -> Tensor:
    """0 with probability `rate`, otherwise 1 / (1 - rate)."""
    kept = torch.rand(shape, generator=generator, device=generator.device) >= rate
    return kept / (1 - rate)

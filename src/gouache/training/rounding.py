"""Weights in half precision: the optimizer changes float32 copies of them, so that small changes are not lost.

With 8 bits of precision, a change of less than 1/256 of a bfloat16 weight would round to nothing. "master": float32
copies are kept for the whole run and stored in checkpoints. "stochastic": they exist only during a step, and are
rounded up or down at random, so that the expectation of the rounded weight is the exact one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from gouache.errors import RequestError
from gouache.training.objective import step_generator

Rounding = Literal["master", "stochastic"]


class Masters:
    """What the optimizer changes: `tensors` are the parameters themselves, or the copies of those in half precision."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], rounding: Rounding) -> None:
        """Raises RequestError for stochastic rounding of anything but bfloat16."""
        self.rounding = rounding
        self._half = {name: each for name, each in parameters.items() if each.dtype in (torch.bfloat16, torch.float16)}
        if rounding == "stochastic" and any(each.dtype == torch.float16 for each in self._half.values()):
            raise RequestError("rounding", "stochastic rounding is for bfloat16 weights, these are float16")
        self.tensors: dict[str, nn.Parameter] = {
            name: nn.Parameter(each.detach().float()) if name in self._half else each
            for name, each in parameters.items()
        }

    @property
    def exact(self) -> dict[str, Tensor]:
        """The trained weights as they belong in a checkpoint: nothing is lost by loading them."""
        halves = self._half if self.rounding == "stochastic" else {}
        return {name: halves.get(name, tensor).detach() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def load(self) -> None:
        """Make the copies anew from the parameters, if there are none at the moment."""
        for name, parameter in self._half.items():
            if self.tensors[name].shape != parameter.shape:
                self.tensors[name].data = parameter.detach().float()

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of half-precision parameters to those of the copies, in float32; after each backward."""
        self.load()
        for name, parameter in self._half.items():
            master, gradient = self.tensors[name], parameter.grad
            if gradient is not None:
                master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    @torch.no_grad()
    def store(self, seed: int, step: int) -> None:
        """Round the copies to the parameters, after optimizer step `step`; random numbers are those of (seed, step)."""
        if self.rounding == "master":
            for name, parameter in self._half.items():
                parameter.copy_(self.tensors[name])
        elif self._half:
            generator = step_generator(seed, step, next(iter(self._half.values())).device)
            for name, parameter in self._half.items():
                master = self.tensors[name]
                parameter.copy_(round_stochastically(master, generator))
                master.grad = None
                master.data = torch.empty(0, device=master.device)

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Set the copies to `weights`, which a checkpoint has."""
        self.load()
        for name in self._half:
            self.tensors[name].copy_(weights[name])


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up with the probability of the position between both neighbours.

    bfloat16 is the upper half of float32: random numbers are added to the lower half, which is then cut off.
    """
    lower = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32, device=generator.device)
    bits = (x.contiguous().view(torch.int32) + lower.to(x.device)) & -(1 << 16)
    return torch.where(x.isfinite(), bits.view(torch.float32), x).bfloat16()

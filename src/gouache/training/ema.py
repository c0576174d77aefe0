"""An exponential moving average of the weights, which usually generates better images than the last weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """Averages of `weights` in float32, by name. The decay increases to its limit: min(decay, (1+n)/(10+n)).

    With `on_cpu` they are kept in the memory of the computer instead of that of the weights' device.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float, on_cpu: bool = False) -> None:
        self.decay = decay
        self.updates = 0
        self.weights: dict[str, Tensor] = {
            name: torch.empty_like(tensor, dtype=torch.float32, device="cpu" if on_cpu else None, requires_grad=False)
            for name, tensor in weights.items()
        }
        self.start(weights)

    @torch.no_grad()
    def start(self, weights: Mapping[str, Tensor]) -> None:
        """Begin anew from `weights`."""
        self.updates = 0
        for name, average in self.weights.items():
            average.copy_(weights[name])

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, average in self.weights.items():
            average.lerp_(weights[name].to(average), 1 - decay)

    @torch.no_grad()
    def gap(self, weights: Mapping[str, Tensor]) -> float:
        """The distance of the averages from `weights`, as a share of the norm of `weights`."""
        apart = sum(float((average - weights[name].to(average)).pow(2).sum()) for name, average in self.weights.items())
        norm = sum(float(weights[name].detach().float().pow(2).sum()) for name in self.weights)
        return (apart / norm) ** 0.5 if norm else 0.0

"""A Brownian path over noise levels whose increments do not depend on earlier queries.

SDE samplers need noise that belongs to an interval: the increments of two half steps must add up to that of the whole
step. The path is the virtual Brownian tree of Li et al. 2020: W(0) = 0, W(2^14) is sampled, and each midpoint is
sampled given its neighbours (a Brownian bridge), with a seed derived from the path's seed and the node. Every float is
a dyadic fraction, so bisection ends exactly on the requested level: 30 to 45 samples per level.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from gouache.errors import RequestError

HIGHEST_LEVEL = 2.0**14  # above every model's sigma_max, including 4518.8 for zero terminal SNR


class BrownianPath:
    """One path W(sigma) of tensors of `shape`, with W(0) = 0 and Var[W(b) - W(a)] = |b - a|, fixed by `seed`."""

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        self._seed = seed
        self._shape = shape
        self._recent: dict[float, Tensor] = {}

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        """The increment from sigma to sigma_next divided by sqrt|sigma_next - sigma|: standard normal, float32.

        The levels are rounded to float32 first. For two equal levels the result is 0.
        """
        start, end = (_as_float32(level) for level in (sigma, sigma_next))
        # A sampler's next interval starts at a level of this one: caching two levels halves the work.
        self._recent = {level: self._at(level) for level in (start, end)}
        if start == end:
            return torch.zeros(self._shape, dtype=torch.float32)
        return (self._recent[end] - self._recent[start]) / math.sqrt(abs(end - start))

    def _at(self, level: float) -> Tensor:
        if level in self._recent:
            return self._recent[level]
        if not 0 <= level <= HIGHEST_LEVEL:
            raise RequestError("sigmas", f"noise level {level} is out of range; expected 0 to {HIGHEST_LEVEL:.0f}")
        low, high, node = 0.0, HIGHEST_LEVEL, 1
        at_low, at_high = torch.zeros(self._shape, dtype=torch.float32), math.sqrt(HIGHEST_LEVEL) * self._normal(0)
        while low < level < high:
            middle = (low + high) / 2
            at_middle = (at_low + at_high) / 2 + math.sqrt(high - low) / 2 * self._normal(node)
            if level < middle:
                high, at_high, node = middle, at_middle, 2 * node
            else:
                low, at_low, node = middle, at_middle, 2 * node + 1
        return at_low if level == low else at_high

    def _normal(self, node: int) -> Tensor:
        digest = hashlib.blake2b(f"{self._seed} {node}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return torch.randn(self._shape, generator=generator, dtype=torch.float32)


def _as_float32(level: float) -> float:
    return float(torch.tensor(level, dtype=torch.float32))

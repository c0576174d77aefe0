"""All random numbers of a run: the starting noise and the noise that samplers add, each image from its own seed.

A batch of N equals N single images: no number depends on the other images. "cpu" noise is torch's CPU generator, the
same for every device; "nv" is torch's GPU generator, reproduced on any machine (both names are A1111's). Numbers are
generated on the CPU in float32 and then moved to the device.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from gouache.diffusion.brownian import BrownianPath
from gouache.diffusion.philox import NvGenerator
from gouache.errors import RequestError

SEEDS = 2**64


class _Source(Protocol):
    def normal(self, shape: tuple[int, ...]) -> Tensor: ...

    def fork(self) -> _Source: ...


class Noise:
    """The noise of one batch. It is stateful: create a new one for each run.

    `seeds` has one integer from 0 to 2^64 - 1 per image; `shape` is that of one image's latent, (C, h, w).
    `variation_seeds` and `variation_strength` (0 to 1) interpolate the starting noise towards that of other seeds.
    `ensd` is A1111's eta noise seed delta: unless 0, the samplers' noise comes from new generators seeded with
    seed + ensd; the starting noise and the Brownian path do not depend on it. Raises RequestError for invalid seeds.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, ...],
        *,
        generator: Literal["cpu", "nv"] = "cpu",
        device: torch.device | str = "cpu",
        variation_seeds: Sequence[int] | None = None,
        variation_strength: float = 0.0,
        ensd: int = 0,
    ) -> None:
        _check(seeds, "seed")
        self._shape = shape
        self._device = device
        self._generators = [_generator(generator, seed) for seed in seeds]
        self._paths = [BrownianPath(seed, shape) for seed in seeds]
        # Generated here even if it is not used, so that the samplers' noise always follows it in each generator.
        start = [source.normal(shape) for source in self._generators]
        if variation_seeds is not None and variation_strength:
            _check(variation_seeds, "variation_seed")
            if len(variation_seeds) != len(seeds):
                counts = f"received {len(variation_seeds)} for a batch of {len(seeds)}"
                raise RequestError("variation_seed", f"{counts}; give one per image")
            others = [_generator(generator, seed).normal(shape) for seed in variation_seeds]
            start = [slerp(a, b, variation_strength) for a, b in zip(start, others)]
        self._start = torch.stack(start).to(device)
        if ensd:
            self._generators = [_generator(generator, (seed + ensd) % SEEDS) for seed in seeds]

    def fork(self) -> Noise:
        """An independent copy that continues with the same noise; this one is unchanged."""
        copied = copy.copy(self)
        copied._generators = [source.fork() for source in self._generators]
        return copied

    def start(self) -> Tensor:
        """The standard normal starting noise (B, C, h, w), the same for every call."""
        return self._start.clone()

    def draw(self) -> Tensor:
        """The next standard normal noise (B, C, h, w) of each image's generator."""
        return torch.stack([source.normal(self._shape) for source in self._generators]).to(self._device)

    def between(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """The increments (B, C, h, w) of each image's Brownian path between two levels, scaled to unit variance."""
        levels = float(sigma), float(sigma_next)
        return torch.stack([path.between(*levels) for path in self._paths]).to(self._device)


def slerp(a: Tensor, b: Tensor, strength: float) -> Tensor:
    """Spherical interpolation from `a` (strength 0) to `b` (strength 1), two latents (C, h, w).

    The interpolated vectors are the columns of the latent, along h, as in A1111. Where they are nearly parallel (mean
    cosine above 0.9995) the interpolation is linear.
    """
    cosine = (a / a.norm(dim=1, keepdim=True) * b / b.norm(dim=1, keepdim=True)).sum(1, keepdim=True)  # (C, 1, w)
    if cosine.mean() > 0.9995:
        return torch.lerp(a, b, strength)
    angle = cosine.acos()
    return (((1 - strength) * angle).sin() * a + (strength * angle).sin() * b) / angle.sin()


class _CpuGenerator:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float32)

    def fork(self) -> _CpuGenerator:
        copied = _CpuGenerator(0)
        copied._generator.set_state(self._generator.get_state())
        return copied


def _generator(name: str, seed: int) -> _Source:
    if name == "cpu":
        return _CpuGenerator(seed)
    if name == "nv":
        return NvGenerator(seed)
    raise RequestError("rng", f"{name!r} is not known; expected 'cpu' or 'nv'")


def _check(seeds: Sequence[int], setting: str) -> None:
    for seed in seeds:
        if not 0 <= seed < SEEDS:
            raise RequestError(setting, f"{seed} is out of range; expected an integer from 0 to 2^64 - 1")

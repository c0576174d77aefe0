"""Aspect-ratio buckets: the sizes that pictures are trained at, and the part of a picture that a size keeps.

Sizes are (width, height) in pixels everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from gouache.errors import RequestError

Size = tuple[int, int]


@dataclass(frozen=True)
class Crop:
    """A picture of `original` size, scaled to `scaled` so that it covers `size`, which is cut out at `offset`.

    `offset` (left, top) is in pixels of the scaled picture.
    """

    original: Size
    scaled: Size
    offset: tuple[int, int]
    size: Size

    @property
    def room(self) -> tuple[int, int]:
        """The largest possible `offset`: the pixels that do not fit, along one side or none."""
        return self.scaled[0] - self.size[0], self.scaled[1] - self.size[1]

    @property
    def lost(self) -> float:
        """The share of the picture that is cut off, 0 to 1."""
        return 1 - (self.size[0] * self.size[1]) / (self.scaled[0] * self.scaled[1])

    @property
    def enlarged(self) -> float:
        """The factor by which the picture is scaled; above 1 it has fewer pixels than it is trained at."""
        return self.scaled[0] / self.original[0]


@dataclass(frozen=True)
class Buckets:
    """The sizes for pictures of all shapes that have about the area of `resolution`.

    Sides are multiples of `step`, from `minimum` to `maximum`; if these are None, from half to twice the side of a
    square of that area. `upscale` False: a picture for which all sizes are too large is not enlarged, but gets a size
    of its own, whatever the minimum; only a side below `step` is enlarged. `fixed`: `resolution` is the only size.

    Raises RequestError if there is no such size.
    """

    resolution: Size
    step: int = 64
    minimum: int | None = None
    maximum: int | None = None
    upscale: bool = True
    fixed: bool = False

    def __post_init__(self) -> None:
        if self.step < 1:
            raise RequestError("bucket_step", f"is {self.step}; expected at least 1")
        width, height = self.resolution
        if min(width, height) < self.step or (self.fixed and (width % self.step or height % self.step)):
            kind = f"multiples of {self.step}" if self.fixed else f"at least {self.step}"
            raise RequestError("resolution", f"{width}x{height}: sides must be {kind}")
        if not self.sizes:
            raise RequestError(
                "resolution",
                f"{width}x{height}: no size with sides from {self._low} to {self._high} in steps of {self.step} fits "
                "into that area",
            )

    @property
    def area(self) -> int:
        return self.resolution[0] * self.resolution[1]

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """For each width the largest height whose area fits, and each of these turned by 90 degrees."""
        if self.fixed:
            return (self.resolution,)
        sides = range(-(-self._low // self.step) * self.step, self._high + 1, self.step)
        found = {self.resolution} if all(side in sides for side in self.resolution) else set()
        for side in sides:
            other = min(self.area // side, self._high) // self.step * self.step
            if other in sides:
                found |= {(side, other), (other, side)}
        return tuple(sorted(found))

    def crop(self, original: Size) -> Crop:
        """How a picture is scaled and cut, equally on both sides: to the size at which the least is lost."""
        sizes = self.sizes if self.upscale or self.fixed else self._within(original)
        # Of equals the largest: (512, 512) instead of (448, 448).
        size = min(sizes, key=lambda size: (cover(original, size).lost, -size[0] * size[1], size))
        return cover(original, size)

    def _within(self, original: Size) -> Sequence[Size]:
        """The sizes for a picture that are not larger than it."""
        width, height = (max(min(side, self._high), self.step) for side in original)
        if original[0] * original[1] < self.area:
            return [(width // self.step * self.step, height // self.step * self.step)]
        if fitting := [size for size in self.sizes if size[0] <= width and size[1] <= height]:
            return fitting
        short, long = sorted((width, height))
        sides = range(self.step, short + 1, self.step)
        found = [(max(min(long, self.area // side) // self.step, 1) * self.step, side) for side in sides]
        return found if width > height else [(side, other) for other, side in found]

    @property
    def _low(self) -> int:
        return self.minimum if self.minimum is not None else max(self.step, math.isqrt(self.area) // 2)

    @property
    def _high(self) -> int:
        return self.maximum if self.maximum is not None else math.isqrt(self.area) * 2


def crops(original: Size, buckets: Sequence[Buckets], resolution: Size | None = None) -> list[Crop]:
    """How a picture is seen at each of `buckets`, each size once; at its own `resolution` if it has one."""
    if resolution is not None:
        buckets = [replace(buckets[0], resolution=resolution)]
    return list({crop.size: crop for crop in (each.crop(original) for each in buckets)}.values())


def cover(original: Size, size: Size) -> Crop:
    """A picture scaled with its proportions kept, just large enough to cover `size`, which is cut from its centre."""
    # In whole numbers: the side that decides gets exactly its length, the other is rounded.
    (width, height), (w, h) = original, size
    if w * height >= h * width:
        scaled = w, max(h, round(height * w / width))
    else:
        scaled = max(w, round(width * h / height)), h
    return Crop(original, scaled, ((scaled[0] - w) // 2, (scaled[1] - h) // 2), size)

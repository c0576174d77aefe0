"""Which things a picture shows, judged by template matching: every thing is composited over the picture's background.

No network and no training: a hypothesis is a glyph of the font, a size, a position and an angle; its gain is the amount
by which it reduces the squared difference to a picture of the background alone. All things are tried in all sizes and
positions on a coarse picture, the best candidates again on a finer one. So the judge shares nothing with the model that
it judges.

With background B (one colour), picture I = B + D, and a glyph of premultiplied colour c and alpha a, the remaining
squared difference is |D - (c - a B)|^2 instead of |D|^2; the gain 2 D.(c - a B) - |c - a B|^2 is a few inner products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from recipes.mini.image_measures import background_rgb
from recipes.mini.names import Colour, Thing
from recipes.mini.rendering import Glyphs, tinted

COARSE, FINE = 24, 64  # pixels along the side
SMALL_SIZES = (0.42, 0.47)  # as fractions of the frame: of things on the quarters
LARGE_SIZES = (0.60, 0.66, 0.72, 0.80, 0.88)  # and of things in the middle
QUARTERS = (0.25, 0.5, 0.75)
OFFSETS = (-1 / COARSE, 0.0, 1 / COARSE)  # of a large thing from the middle, on the coarse picture
ANGLES = (-8.0, 0.0, 8.0)  # degrees
SEARCH_RADIUS = 3  # pixels of the finer picture, along each axis
CANDIDATES = 40  # hypotheses that are tried again
MIN_DISTANCE = 0.3  # of two things' centres, as a fraction of the frame


@dataclass(frozen=True, slots=True)
class Match:
    """A thing by its number, its centre and size (fractions of the frame), and its gain."""

    thing: int
    x: float
    y: float
    size: float
    gain: float


class Matcher:
    """Finds things of one list in pictures: in their usual colours and, given a `tint`, recoloured with it too.

    Needs half a gigabyte for nine hundred things, a whole one with a tint.
    """

    def __init__(self, things: Sequence[Thing], glyphs: Glyphs, tint: Colour | None = None) -> None:
        self.things, self.glyphs = things, glyphs
        self.tints: tuple[Colour | None, ...] = (None,) if tint is None else (None, tint)
        self._cache: dict[tuple[int, Colour | None, float, float, float], Tensor] = {}
        self.spots = [(x, y, size) for size in SMALL_SIZES for y in QUARTERS for x in QUARTERS]
        self.spots += [(0.5 + dx, 0.5 + dy, size) for size in LARGE_SIZES for dy in OFFSETS for dx in OFFSETS]
        templates = torch.stack(
            [self._template(bitmap, *spot, COARSE) for bitmap in self._bitmaps() for spot in self.spots]
        )
        self.colour, self.alpha = templates[:, :3].flatten(1), templates[:, 3].flatten(1)
        self.products = _inner_products(templates)

    def _bitmaps(self) -> Iterator[Image.Image]:
        for tint in self.tints:
            for thing in self.things:
                yield self._bitmap(thing, tint)

    def _bitmap(self, thing: Thing, tint: Colour | None) -> Image.Image:
        bitmap = self.glyphs[thing.glyph]
        return bitmap if tint is None else tinted(bitmap, tint)

    @staticmethod
    def _template(bitmap: Image.Image, x: float, y: float, size: float, side: int, angle: float = 0.0) -> Tensor:
        """(4, side, side) in 0..1: premultiplied colour, and alpha."""
        # Pasted at its original size on a large frame, which is then reduced: so positions need not be whole pixels.
        frame = round(max(bitmap.size) / size)
        if angle:
            bitmap = bitmap.rotate(angle, Image.Resampling.BILINEAR, expand=True)
        large = Image.new("RGBa", (frame, frame))
        large.paste(bitmap, (round(x * frame - bitmap.width / 2), round(y * frame - bitmap.height / 2)))
        small = large.resize((side, side), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 255

    def find(self, picture: Image.Image, count: int = 1) -> list[Match]:
        """The `count` (1 or 2) different things with the largest total gain, largest gain first."""
        background = torch.from_numpy(background_rgb(picture) / 255).float()
        coarse, fine = (_minus_background(picture, background, side) for side in (COARSE, FINE))
        inner = self.colour @ coarse.flatten() - (self.alpha @ coarse.flatten(1).T) @ background
        gains = (2 * inner - _squared_norm(self.products, background)).view(-1, len(self.spots))
        if count == 1:
            all_spots = list(range(len(self.spots)))
            return [max(self._refine(gains, all_spots, fine, background), key=lambda match: match.gain)]
        candidates = [
            each for spots in self._spots_by_centre() for each in self._refine(gains, spots, fine, background)
        ]
        pairs = [
            (a, b)
            for number, a in enumerate(candidates)
            for b in candidates[:number]
            if a.thing != b.thing and np.hypot(a.x - b.x, a.y - b.y) > MIN_DISTANCE
        ]
        return sorted(max(pairs, key=lambda pair: pair[0].gain + pair[1].gain), key=lambda match: -match.gain)

    def _spots_by_centre(self) -> list[list[int]]:
        """The indices of the spots for small things, one list per centre."""
        small = [number for number, spot in enumerate(self.spots) if spot[2] in SMALL_SIZES]
        return [small[centre :: len(QUARTERS) ** 2] for centre in range(len(QUARTERS) ** 2)]

    def _refine(self, gains: Tensor, spots: list[int], fine: Tensor, background: Tensor) -> list[Match]:
        """The best candidates for some spots, each with the size, angle and position of the largest gain."""
        best, where = gains[:, spots].max(1)
        rows = best.topk(min(CANDIDATES, len(best))).indices
        matches = []
        padded = F.pad(fine, (SEARCH_RADIUS,) * 4)[None]
        for row, spot in zip(rows.tolist(), where[rows].tolist()):
            x, y, size = self.spots[spots[spot]]
            kernels = self._kernels(row, x, y, size)
            inner = F.conv2d(padded, kernels[:, :3])
            alpha_inner = torch.stack([F.conv2d(padded[:, c : c + 1], kernels[:, 3:])[0] for c in range(3)])
            score = (
                2 * (inner[0] - torch.einsum("c,ckyx->kyx", background, alpha_inner))
                - _squared_norm(_inner_products(kernels), background)[:, None, None]
            )
            gain, index = score.flatten().max(0)
            _, dy, dx = np.unravel_index(int(index), score.shape)
            dx, dy = (float(step - SEARCH_RADIUS) / FINE for step in (dx, dy))
            matches.append(Match(row % len(self.things), x + dx, y + dy, size, float(gain)))
        return matches

    def _kernels(self, row: int, x: float, y: float, size: float) -> Tensor:
        """(sizes * angles, 4, FINE, FINE)."""
        tint, thing = self.tints[row // len(self.things)], row % len(self.things)
        key = (thing, tint, x, y, size)
        if key not in self._cache:
            bitmap = self._bitmap(self.things[thing], tint)
            templates = [
                self._template(bitmap, x, y, size * scale, FINE, angle)
                for scale in (0.96, 1.0, 1.04)
                for angle in ANGLES
            ]
            self._cache[key] = (torch.stack(templates) * 255).round().byte()
        return self._cache[key].float() / 255


def _minus_background(picture: Image.Image, background: Tensor, side: int) -> Tensor:
    """(3, side, side): the reduced picture minus its background's colour."""
    small = picture.convert("RGB").resize((side, side), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 255 - background[:, None, None]


def _inner_products(templates: Tensor) -> Tensor:
    """(N, 5) of (N, 4, y, x): |c|^2, c.a of each colour channel, |a|^2."""
    colour, alpha = templates[:, :3], templates[:, 3:]
    return torch.stack(
        [colour.pow(2).sum((1, 2, 3)), *(colour * alpha).sum((2, 3)).unbind(1), alpha.pow(2).sum((1, 2, 3))], 1
    )


def _squared_norm(products: Tensor, background: Tensor) -> Tensor:
    """|c - a B|^2 (N) from `_inner_products` and B (3)."""
    return products[:, 0] - 2 * products[:, 1:4] @ background + products[:, 4] * background.pow(2).sum()

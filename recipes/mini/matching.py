"""Which things a picture shows, judged by laying every thing over its ground and measuring what is left.

No network and no training: a hypothesis is a glyph of the font, a size, a place and a turn; it explains so much of a
picture as it brings down the squared difference to a picture of the ground alone. All things are tried in all sizes and
places on a coarse picture, the likeliest again on a finer one. So the judge shares nothing with the model it judges.

With ground G (one colour), picture I = G + D, and a glyph of colour c (times its cover) and cover a, what is left of
|D|^2 is |D - (c - a G)|^2; the gain 2 D.(c - a G) - |c - a G|^2 is a few inner products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from recipes.mini.looks import ground_of
from recipes.mini.names import Colour, Thing
from recipes.mini.rendering import Glyphs, tinted

COARSE, FINE = 24, 64  # pixels along the side
SMALL = (0.42, 0.47)  # sizes, as shares of the frame: of things on the quarters
LARGE = (0.60, 0.66, 0.72, 0.80, 0.88)  # and of those in the middle
QUARTERS = (0.25, 0.5, 0.75)
NEAR = (-1 / COARSE, 0.0, 1 / COARSE)  # how far a large thing may stray, on the coarse picture
TURNS = (-8.0, 0.0, 8.0)  # degrees
STRAY = 3  # pixels of the finer picture, either way
LIKELY = 40  # hypotheses that are tried again
APART = 0.3  # of the frame: the least distance of two things' centres


@dataclass(frozen=True, slots=True)
class Found:
    """A thing by its number, where its centre is (shares of the frame), its size, and how much it explains."""

    thing: int
    x: float
    y: float
    size: float
    gain: float


class Matcher:
    """Finds things of one list in pictures; with a `tint`, things painted in it as well as things in their own colours.

    Needs half a gigabyte for nine hundred things, a whole one with a tint.
    """

    def __init__(self, things: Sequence[Thing], glyphs: Glyphs, tint: Colour | None = None) -> None:
        self.things, self.glyphs = things, glyphs
        self.tints: tuple[Colour | None, ...] = (None,) if tint is None else (None, tint)
        self._kept: dict[tuple[int, Colour | None, float, float, float], Tensor] = {}
        self.spots = [(x, y, size) for size in SMALL for y in QUARTERS for x in QUARTERS]
        self.spots += [(0.5 + dx, 0.5 + dy, size) for size in LARGE for dy in NEAR for dx in NEAR]
        laid = torch.stack([self._laid(bitmap, *spot, COARSE) for bitmap in self._bitmaps() for spot in self.spots])
        self.colour, self.cover = laid[:, :3].flatten(1), laid[:, 3].flatten(1)
        self.fixed = _squares(laid)

    def _bitmaps(self) -> Iterator[Image.Image]:
        for tint in self.tints:
            for thing in self.things:
                yield self._bitmap(thing, tint)

    def _bitmap(self, thing: Thing, tint: Colour | None) -> Image.Image:
        bitmap = self.glyphs[thing.glyph]
        return bitmap if tint is None else tinted(bitmap, tint)

    @staticmethod
    def _laid(bitmap: Image.Image, x: float, y: float, size: float, side: int, turn: float = 0.0) -> Tensor:
        """(4, side, side) in 0..1: colour times cover, and cover."""
        # Laid at its own size on a frame that large, and the frame made small: so a place need not be a whole pixel.
        frame = round(max(bitmap.size) / size)
        if turn:
            bitmap = bitmap.rotate(turn, Image.Resampling.BILINEAR, expand=True)
        whole = Image.new("RGBa", (frame, frame))
        whole.paste(bitmap, (round(x * frame - bitmap.width / 2), round(y * frame - bitmap.height / 2)))
        small = whole.resize((side, side), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 255

    def find(self, picture: Image.Image, count: int = 1) -> list[Found]:
        """The `count` (1 or 2) different things that together explain most of a picture, most first."""
        ground = torch.from_numpy(ground_of(picture) / 255).float()
        coarse, fine = (_beside(picture, ground, side) for side in (COARSE, FINE))
        inner = self.colour @ coarse.flatten() - (self.cover @ coarse.flatten(1).T) @ ground
        gains = (2 * inner - _square(self.fixed, ground)).view(-1, len(self.spots))
        if count == 1:
            everywhere = list(range(len(self.spots)))
            return [max(self._again(gains, everywhere, fine, ground), key=lambda found: found.gain)]
        likely = [each for place in self._places() for each in self._again(gains, place, fine, ground)]
        pairs = [
            (a, b)
            for number, a in enumerate(likely)
            for b in likely[:number]
            if a.thing != b.thing and np.hypot(a.x - b.x, a.y - b.y) > APART
        ]
        return sorted(max(pairs, key=lambda pair: pair[0].gain + pair[1].gain), key=lambda found: -found.gain)

    def _places(self) -> list[list[int]]:
        """The numbers of the spots for small things, place by place."""
        small = [number for number, spot in enumerate(self.spots) if spot[2] in SMALL]
        return [small[place :: len(QUARTERS) ** 2] for place in range(len(QUARTERS) ** 2)]

    def _again(self, gains: Tensor, spots: list[int], fine: Tensor, ground: Tensor) -> list[Found]:
        """The things that are likeliest in some spots, each with the size, turn and place that explain most."""
        best, where = gains[:, spots].max(1)
        rows = best.topk(min(LIKELY, len(best))).indices
        found = []
        padded = F.pad(fine, (STRAY,) * 4)[None]
        for row, spot in zip(rows.tolist(), where[rows].tolist()):
            x, y, size = self.spots[spots[spot]]
            kernels = self._kernels(row, x, y, size)
            inner = F.conv2d(padded, kernels[:, :3])
            covered = torch.stack([F.conv2d(padded[:, c : c + 1], kernels[:, 3:])[0] for c in range(3)])
            score = (
                2 * (inner[0] - torch.einsum("c,ckyx->kyx", ground, covered))
                - _square(_squares(kernels), ground)[:, None, None]
            )
            gain, place = score.flatten().max(0)
            _, dy, dx = np.unravel_index(int(place), score.shape)
            found.append(
                Found(row % len(self.things), x + (dx - STRAY) / FINE, y + (dy - STRAY) / FINE, size, float(gain))
            )
        return found

    def _kernels(self, row: int, x: float, y: float, size: float) -> Tensor:
        """(sizes * turns, 4, FINE, FINE)."""
        tint, thing = self.tints[row // len(self.things)], row % len(self.things)
        key = (thing, tint, x, y, size)
        if key not in self._kept:
            bitmap = self._bitmap(self.things[thing], tint)
            laid = [self._laid(bitmap, x, y, size * grown, FINE, turn) for grown in (0.96, 1.0, 1.04) for turn in TURNS]
            self._kept[key] = (torch.stack(laid) * 255).round().byte()
        return self._kept[key].float() / 255


def _beside(picture: Image.Image, ground: Tensor, side: int) -> Tensor:
    """(3, side, side): the picture less its ground."""
    small = picture.convert("RGB").resize((side, side), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 255 - ground[:, None, None]


def _squares(laid: Tensor) -> Tensor:
    """(N, 5) of (N, 4, y, x): |c|^2, c.a of each colour, |a|^2."""
    colour, cover = laid[:, :3], laid[:, 3:]
    return torch.stack(
        [colour.pow(2).sum((1, 2, 3)), *(colour * cover).sum((2, 3)).unbind(1), cover.pow(2).sum((1, 2, 3))], 1
    )


def _square(squares: Tensor, ground: Tensor) -> Tensor:
    """|c - a G|^2 (N) by `_squares` and G (3)."""
    return squares[:, 0] - 2 * squares[:, 1:4] @ ground + squares[:, 4] * ground.pow(2).sum()

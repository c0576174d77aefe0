"""The masks that an inpainting network is trained with, drawn at random; see `model.inpainting`."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from gouache.data.buckets import Size

SHARES = {"strokes": 0.4, "rectangles": 0.35, "everything": 0.2, "nothing": 0.05}
"""How often each kind of mask is drawn. Without "everything" a network forgets to paint from the caption alone."""


CELL = 8  # pixels of a latent cell: a thinner stroke would hide pixels and not show in the mask of the latent


def draw_mask(size: Size, generator: torch.Generator) -> Tensor:
    """A random mask (1, H, W) of 0 and 1 for a picture of `size` (width, height): 1 is to be painted."""
    kind = list(SHARES)[int(torch.multinomial(torch.tensor(list(SHARES.values())), 1, generator=generator))]
    image = Image.new("L", size, 255 if kind == "everything" else 0)
    if kind == "strokes":
        _strokes(image, generator)
    elif kind == "rectangles":
        _rectangles(image, generator)
    return torch.from_numpy(np.array(image))[None].float().div(255)


def _rectangles(image: Image.Image, generator: torch.Generator) -> None:
    """One to three, each side a tenth to two thirds of the picture's."""
    draw = ImageDraw.Draw(image)
    for _ in range(_between(1, 3, generator)):
        width, height = (_between(side // 10, side * 2 // 3, generator) for side in image.size)
        width, height = (min(side, max(CELL, length)) for side, length in zip(image.size, (width, height)))
        left, top = _between(0, image.width - width, generator), _between(0, image.height - height, generator)
        draw.rectangle((left, top, left + width - 1, top + height - 1), fill=255)


def _strokes(image: Image.Image, generator: torch.Generator) -> None:
    """One to four bent strokes of a round brush, a twentieth to a fifth of the shorter side wide."""
    draw, short = ImageDraw.Draw(image), min(image.size)
    for _ in range(_between(1, 4, generator)):
        radius = max(CELL, _between(short // 20, short // 5, generator)) // 2
        points = [
            (_between(0, image.width - 1, generator), _between(0, image.height - 1, generator))
            for _ in range(_between(2, 6, generator))
        ]
        draw.line(points, fill=255, width=2 * radius + 1)
        for x, y in points:  # round ends and joints
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)


def _between(low: int, high: int, generator: torch.Generator) -> int:
    """A random integer from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))

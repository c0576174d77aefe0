"""In which colours a picture is painted, and how near two pictures are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from recipes.mini.names import Colour, nearest_colour

APART = 48.0  # how far a pixel must lie from the ground's colour to be the thing's, in sRGB of 0..255
SMALL = 32  # the side that pictures are compared at
ALIKE = 0.03  # pictures whose pixels, in 0..1, differ by less on (quadratic) average are the same to the eye


def ground_of(picture: Image.Image) -> np.ndarray:
    """The median colour (3,) of the picture's outermost sixteenth, in sRGB."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    edge = max(1, min(picture.size) // 16)
    border = np.ones(pixels.shape[:2], bool)
    border[edge:-edge, edge:-edge] = False
    return np.median(pixels[border], axis=0)


def paint_of(picture: Image.Image) -> Colour | None:
    """The named colour nearest to the median of what is not ground; None where all is ground."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    thing = pixels[np.linalg.norm(pixels - ground_of(picture), axis=2) > APART]
    return nearest_colour(np.median(thing, axis=0).tolist()) if len(thing) else None


def thumbs(pictures: Sequence[Image.Image]) -> Tensor:
    """(B, 3 * SMALL * SMALL) in 0..1."""
    small = [picture.convert("RGB").resize((SMALL, SMALL), Image.Resampling.BOX) for picture in pictures]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in small])).flatten(1).float() / 255


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Root mean squares of the differences between all rows of (A, N) and (B, N): (A, B)."""
    return torch.cdist(a, b) / a.shape[1] ** 0.5

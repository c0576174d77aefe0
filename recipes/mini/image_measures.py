"""Measures of pictures: the colours of background and thing, and the distance between pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from recipes.mini.names import Colour, nearest_colour

THING_DISTANCE = 48.0  # pixels farther than this from the background's colour belong to the thing; sRGB, 0..255
THUMBNAIL = 32  # the side that pictures are compared at
SAME_DISTANCE = 0.03  # pictures at a smaller RMS distance of their pixels, in 0..1, look the same


def background_rgb(picture: Image.Image) -> np.ndarray:
    """The median colour (3,) of the picture's outermost sixteenth, in sRGB 0..255."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    edge = max(1, min(picture.size) // 16)
    border = np.ones(pixels.shape[:2], bool)
    border[edge:-edge, edge:-edge] = False
    return np.median(pixels[border], axis=0)


def thing_colour(picture: Image.Image) -> Colour | None:
    """The named colour nearest to the median of all pixels that are not background; None if there are none."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    thing = pixels[np.linalg.norm(pixels - background_rgb(picture), axis=2) > THING_DISTANCE]
    return nearest_colour(np.median(thing, axis=0).tolist()) if len(thing) else None


def thumbnails(pictures: Sequence[Image.Image]) -> Tensor:
    """(B, 3 * THUMBNAIL * THUMBNAIL) in 0..1."""
    small = [picture.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX) for picture in pictures]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in small])).flatten(1).float() / 255


def distances(a: Tensor, b: Tensor) -> Tensor:
    """RMS distances (A, B) between all rows of (A, N) and (B, N)."""
    return torch.cdist(a, b) / a.shape[1] ** 0.5

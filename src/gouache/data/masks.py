"""Masks that limit the loss to a part of each picture: from the alpha channel, a file, or both."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

from gouache.errors import RequestError, printable
from gouache.images import pixels


def mask_of(picture: Image.Image, alpha: bool, file: Image.Image | None, name: str) -> Image.Image | None:
    """The mask of a normalised `picture`, of the same size, in mode L: white counts. None if there is none.

    `alpha`: opaque parts count. `file` is a normalised picture whose white parts count; it may have another size of
    the same proportions. With both, only what both allow counts. Raises RequestError, which calls the mask `name`.
    """
    mask = picture.getchannel("A") if alpha and picture.mode == "RGBA" else None
    if file is None:
        return mask
    if abs(file.width * picture.height - file.height * picture.width) > sum(picture.size):
        raise RequestError(
            "mask",
            f"{printable(name)} has {file.width}x{file.height} pixels and its picture {picture.width}x"
            f"{picture.height}; expected the same proportions",
        )
    drawn = pixels.as_mask(file)
    if drawn.size != picture.size:
        drawn = drawn.resize(picture.size, Image.Resampling.BOX)
    return drawn if mask is None else ImageChops.multiply(mask, drawn)


def to_latent(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """mask (1, H, W) -> (1, h, w) for latents of `size` (h, w): the share of each latent cell that counts."""
    return F.interpolate(mask[None], size=size, mode="area")[0]


def to_tensor(mask: Image.Image) -> Tensor:
    """A mask in mode L -> (1, H, W) float32, 0 to 1."""
    return torch.from_numpy(np.array(mask))[None].float() / 255

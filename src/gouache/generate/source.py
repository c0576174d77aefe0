"""What a pass starts from besides noise: its size, a picture, a mask, extra channels for the U-Net."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gouache.errors import RequestError
from gouache.generate.request import MAX_SIDE, Request, Size
from gouache.images import pixels
from gouache.model.inpainting import concat_channels
from gouache.model.model import Model


@dataclass(frozen=True)
class Source:
    """`latent` (1, C, h, w) is the picture to change, `mask` (1, 1, h, w) is 1 where to paint and 0 where to keep.

    An inpainting model has no `mask` here: it receives it in `concat` and keeps to it by itself. `concat` (1, E, h, w)
    are the channels that an inpainting, edit or depth model receives beside x. `shape` is that of a latent, (C, h, w).
    """

    size: Size
    shape: tuple[int, int, int]
    latent: Tensor | None
    mask: Tensor | None
    concat: Tensor | None


def pass_size(model: Model, request: Request) -> Size:
    """The size of the first pass. Raises RequestError if the model's VAE cannot decode it."""
    size = request.size or (_init_size(request.init.size, model.size) if request.init is not None else model.size)
    check_size(model, size)
    return size


def check_size(model: Model, size: Size) -> None:
    factor = model.vae.spec.factor
    if size[0] % factor or size[1] % factor:
        raise RequestError("size", f"{size[0]}x{size[1]}: with this model, sides must be multiples of {factor}")


def read_source(model: Model, request: Request, size: Size) -> Source:
    """The pictures of `request`, fitted to `size` and encoded. Raises RequestError if one is missing."""
    factor = model.vae.spec.factor
    shape = (model.vae.spec.latent_channels, size[1] // factor, size[0] // factor)
    image = None if request.init is None else pixels.to_tensor([pixels.fit(request.init.rgb(), size)])
    mask_pixels = None  # (1, 1, H, W)
    if request.mask is not None:
        mask_pixels = pixels.mask_to_tensor(pixels.fit(pixels.as_mask(request.mask.image), size))
    mask = None
    if mask_pixels is not None and model.variant != "inpainting":
        # The maximum: a stroke thinner than a latent cell is painted too.
        mask = F.max_pool2d(mask_pixels, factor).to(model.device)
    latent = None if image is None else model.encode(image)
    return Source(size, shape, latent, mask, _concat(model, request, image, mask_pixels, shape))


def _concat(
    model: Model, request: Request, image: Tensor | None, mask: Tensor | None, shape: tuple[int, int, int]
) -> Tensor | None:
    match model.variant:
        case "inpainting":
            # Without a picture or a mask nothing is kept: the picture is grey and all of it is to be painted.
            if image is None:
                image = torch.zeros(1, 3, *(side * model.vae.spec.factor for side in shape[1:]))
            if mask is None:
                mask = torch.ones_like(image[:, :1])
            return concat_channels(model.encode, image, mask)
        case "instruct-pix2pix":
            if image is None:
                raise RequestError("init", "is missing: this model changes a picture by instruction, so it needs one")
            # These channels are not scaled (Brooks et al. 2023).
            return model.encode(image) / model.latent_scale
        case "depth":
            if request.depth is None:
                raise RequestError("depth", "is missing: this model is conditioned on depth; give a depth picture")
            near: Image.Image = pixels.fit(request.depth.rgb(), (shape[2], shape[1]))
            depth = pixels.to_tensor([near]).mean(1, keepdim=True).to(model.device)
            low, high = depth.amin(), depth.amax()
            return 2 * (depth - low) / (high - low).clamp_min(1e-6) - 1
    return None


LARGEST = 4  # times the area that a model was made for; a larger picture to start from is scaled down


def _init_size(size: Size, usual: Size) -> Size:
    """The size for a picture to start from, in multiples of 8: its own, unless it is far larger than the model's."""
    area, most = size[0] * size[1], LARGEST * usual[0] * usual[1]
    scale = math.sqrt(usual[0] * usual[1] / area) if area > most else 1.0
    width, height = (max(8, int(side * scale) // 8 * 8) for side in size)
    if max(width, height) > MAX_SIDE:
        raise RequestError(
            "init", f"is {size[0]}x{size[1]}, too narrow to start from; cut it, or give the size to paint with size"
        )
    return width, height

"""What a painting starts from besides noise: its size, a picture, a mask, extra channels for the U-Net."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gouache.errors import RequestError
from gouache.generate.request import Request
from gouache.images import pixels
from gouache.model.model import Model


@dataclass(frozen=True)
class Source:
    """`latent` (1, C, h, w) is the picture to change, `mask` (1, 1, h, w) is 1 where to paint, 0 what to keep.

    An inpainting model has no `mask` here: it is shown it, and keeps to it by itself. `concat` (1, E, h, w) are the
    channels that an inpainting, edit or depth model reads beside x. `shape` is that of one latent, (C, h, w). `hashes`
    are the sha256 of the files read, by setting.
    """

    size: tuple[int, int]
    shape: tuple[int, int, int]
    latent: Tensor | None
    mask: Tensor | None
    concat: Tensor | None
    hashes: Mapping[str, str]


def read_source(model: Model, request: Request) -> Source:
    """Read what `request` starts from, fitted to its size. Raises RequestError where a file is missing or wrong."""
    hashes = {
        name: sha256(path)
        for name, path in (("init", request.init), ("mask", request.mask), ("depth", request.depth))
        if path is not None and path.is_file()
    }
    picture = None if request.init is None else pixels.read(request.init, "init")
    size = request.size or (_multiple_of_eight(picture.size) if picture is not None else model.size)
    factor = model.vae.spec.factor
    if size[0] % factor or size[1] % factor:
        raise RequestError("size", f"{size[0]}x{size[1]}: this model paints sides that are multiples of {factor}")
    shape = (model.vae.spec.latent_channels, size[1] // factor, size[0] // factor)

    image = None if picture is None else pixels.to_tensor([pixels.fit(picture, size)])
    whole = None  # the mask at the picture's own size
    if request.mask is not None:
        whole = pixels.mask_to_tensor(pixels.fit(pixels.read(request.mask, "mask"), size))
    mask = None
    if whole is not None and model.variant != "inpainting":
        mask = F.interpolate(whole, size=shape[1:], mode="nearest").to(model.device)
    latent = None if image is None else model.encode(image)
    return Source(size, shape, latent, mask, _concat(model, request, image, whole, shape), hashes)


def _concat(
    model: Model, request: Request, image: Tensor | None, mask: Tensor | None, shape: tuple[int, int, int]
) -> Tensor | None:
    match model.variant:
        case "inpainting":
            # Without a picture or mask there is nothing to keep: all of a grey picture is to be painted.
            if image is None:
                image = torch.zeros(1, 3, *(side * model.vae.spec.factor for side in shape[1:]))
            if mask is None:
                mask = torch.ones_like(image[:, :1])
            kept = model.encode(image * (mask < 0.5))
            small = F.interpolate(mask, size=shape[1:], mode="nearest").to(kept)
            return torch.cat([small, kept], dim=1)
        case "instruct-pix2pix":
            if image is None:
                raise RequestError("init", "is missing: this model changes a picture by instruction, so it needs one")
            # This one channel set is not scaled (Brooks et al. 2023).
            return model.encode(image) / model.latent_scale  # whatever autoencoder made it
        case "depth":
            if request.depth is None:
                raise RequestError("depth", "is missing: this model is told how far things are; give a depth picture")
            near = pixels.read(request.depth, "depth")
            depth = pixels.to_tensor([pixels.fit(near, (shape[2], shape[1]))]).mean(1, keepdim=True).to(model.device)
            low, high = depth.amin(), depth.amax()
            return 2 * (depth - low) / (high - low).clamp_min(1e-6) - 1
    return None


def _multiple_of_eight(size: tuple[int, int]) -> tuple[int, int]:
    width, height = (max(8, side // 8 * 8) for side in size)
    return width, height


def sha256(path: Path) -> str:
    """The hash of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

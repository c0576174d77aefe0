"""Upscaling between the two passes of hires fix, with the parameters of A1111's web UI."""

from __future__ import annotations

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gouache.errors import RequestError

# Our names, A1111's names ("Latent", "Latent (nearest-exact)", "Latent (bicubic)") and torch's modes.
LATENT_MODES = {"latent": "bilinear", "nearest-exact": "nearest-exact", "bicubic": "bicubic"}


def upscale_latent(latents: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """latents (B, C, h, w) -> (B, C, height, width); `size` is (width, height) in latent cells, not pixels.

    `mode` is one of `LATENT_MODES`, each without antialiasing. Raises RequestError for another one.
    """
    if mode not in LATENT_MODES:
        raise RequestError("hires_upscaler", f"{mode!r} does not work on latents; expected {', '.join(LATENT_MODES)}")
    width, height = size
    return F.interpolate(latents, size=(height, width), mode=LATENT_MODES[mode], antialias=False)


def upscale_picture(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`picture` at (width, height) by Lanczos, stretched if the aspect ratio differs (`pixels.fit` crops instead)."""
    return picture.resize(size, Image.Resampling.LANCZOS)

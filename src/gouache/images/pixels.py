"""Picture <-> tensor: RGB of 8 bits on one side, (B, 3, H, W) float32 in [-1, 1] on the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from gouache.errors import RequestError

MOST_PIXELS = 64_000_000  # a picture beyond this is a mistake or a bomb


def read(path: Path, setting: str) -> Image.Image:
    """The picture at `path`, upright, as RGB; a transparent one lies on white. `setting` is who asked for it."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF")) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise RequestError(setting, f"{path} has {opened.width}x{opened.height} pixels; at most 64 million")
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16 bits: Pillow would cut them off at 255 instead of scaling
                picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).round().astype(np.uint8))
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            return picture.convert("RGB")
    except FileNotFoundError:
        raise RequestError(setting, f"there is no file {path}") from None
    except IsADirectoryError:
        raise RequestError(setting, f"{path} is a folder; a picture is expected") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(setting, f"{path} is not a picture that can be read ({error})") from None


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size -> (B, 3, H, W) float32 in [-1, 1]."""
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def mask_to_tensor(picture: Image.Image) -> Tensor:
    """A mask, white where to paint -> (1, 1, H, W) of 0 and 1."""
    return torch.from_numpy(np.array(picture.convert("L"))).float()[None, None].div(255).round()


def to_pictures(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W), clamped to [-1, 1] -> pictures; each value goes to the nearest of 256 levels."""
    levels = images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return [Image.fromarray(each) for each in levels.permute(0, 2, 3, 1).cpu().numpy()]


def fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`picture` at (width, height): scaled to cover it, then cut evenly on both sides."""
    if picture.size == size:
        return picture
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)

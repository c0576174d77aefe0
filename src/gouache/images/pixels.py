"""Picture <-> tensor: 8-bit RGB on one side, (B, 3, H, W) float32 in [-1, 1] on the other.

`decode` and `normalise` are the only place that opens pictures from outside.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from gouache.errors import RequestError, printable

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 64_000_000  # a larger picture is a mistake or a decompression bomb
MAX_BYTES = 600_000_000  # 64 million pixels of 16-bit RGBA, uncompressed, take 512 MB


def read(path: Path, setting: str) -> Image.Image:
    """The picture at `path`, upright, as RGB, transparency on white.

    Raises RequestError with `setting`, the name of the option that the path was given for.
    """
    return on_white(decode(read_bytes(path, setting), str(path), setting))


def read_bytes(path: Path, setting: str) -> bytes:
    """The content of a regular file of at most `MAX_BYTES`. Raises RequestError."""
    with _opened(path, setting) as file:
        return file.read(MAX_BYTES)


def read_size(path: Path, setting: str) -> tuple[int, int]:
    """(width, height) of the picture at `path`, upright, from its header: the pixels are not decoded.

    Raises RequestError.
    """
    with _opened(path, setting) as file:
        return size_of(file, str(path), setting)


def size_of(file: BinaryIO, name: str, setting: str) -> tuple[int, int]:
    """The same for an open file; `name` is what errors call it."""
    try:
        with Image.open(file, formats=FORMATS) as picture:
            _check_size(picture, name, setting)
            return _upright_size(picture, file)
    except RequestError:
        raise
    except Exception as error:  # see `normalise`
        raise _unreadable(error, name, setting) from None


def _upright_size(picture: Image.Image, file: BinaryIO) -> tuple[int, int]:
    width, height = picture.size
    if picture.format == "TIFF":  # Pillow has turned the size already
        return width, height
    try:
        if picture.format != "PNG" or _orientation_follows(file):
            exif = picture.getexif()
        else:  # PNG's own method would decode the pixels, in search of chunks behind them
            exif = Image.Image.getexif(picture)
        return (height, width) if exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8) else (width, height)
    except _DAMAGED_EXIF:
        return width, height


def _orientation_follows(png: BinaryIO) -> bool:
    """Whether a chunk that can contain an orientation comes after the pixels."""
    position, pixels_seen = png.tell(), False
    png.seek(8)
    try:
        while len(head := png.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if pixels_seen and name in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            pixels_seen = pixels_seen or name == b"IDAT"
            png.seek(length + 4, os.SEEK_CUR)
        return False
    finally:
        png.seek(position)


@contextmanager
def _opened(path: Path, setting: str) -> Iterator[BinaryIO]:
    """A regular file of at most `MAX_BYTES`, open for reading. Raises RequestError, also for errors of reading it."""
    name = _printable(path)
    # O_NONBLOCK: a named pipe without a writer is opened and then refused, instead of waited for.
    flags = os.O_RDONLY
    for flag in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"):
        flags |= getattr(os, flag, 0)
    try:
        if path.is_dir():  # Windows cannot open a folder
            raise RequestError(setting, f"{name} is a folder; a picture is expected")
        with os.fdopen(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise RequestError(setting, f"{name} is not a regular file; a picture is expected")
            if status.st_size > MAX_BYTES:
                raise RequestError(
                    setting, f"{name} has {status.st_size / 1e6:.0f} MB; at most {MAX_BYTES / 1e6:.0f} MB"
                )
            yield file
    except FileNotFoundError:
        raise RequestError(setting, f"there is no file {name}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(setting, f"{name} cannot be read: {_printable(reason)}") from None


def decode(data: bytes, name: str, setting: str) -> Image.Image:
    """An encoded picture as `normalise` gives it; `name` is what errors call it. Raises RequestError."""
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # see `normalise`
        raise _unreadable(error, name, setting) from None
    with opened:
        return normalise(opened, name, setting)


def normalise(picture: Image.Image, name: str, setting: str) -> Image.Image:
    """A copy of `picture`: upright, 8 bits, mode RGBA if it has transparency, else L or RGB. Raises RequestError."""
    _check_size(picture, name, setting)
    try:
        picture = _upright(picture)
        if picture.mode[0] in "IF":  # more than 8 bits: Pillow would clip at 255 instead of scaling
            return Image.fromarray(_levels(np.asarray(picture), name, setting))
        if picture.mode == "La":  # premultiplied, which Pillow converts to LA only
            picture = picture.convert("LA")
        if picture.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in picture.info:
            return picture.convert("RGBA")
        return picture.convert("L" if picture.mode in ("L", "1") else "RGB")
    except RequestError:
        raise
    except Exception as error:  # Pillow's decoders raise almost any exception on damaged files
        raise _unreadable(error, name, setting) from None


def _check_size(picture: Image.Image, name: str, setting: str) -> None:
    count = picture.width * picture.height
    if not 0 < count <= MAX_PIXELS:
        limit = "at most 64 million" if count else "at least 1x1 is needed"
        raise RequestError(setting, f"{_printable(name)} has {picture.width}x{picture.height} pixels; {limit}")


_DAMAGED_EXIF = (SyntaxError, struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError)


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF says; as it is stored if that is damaged, which tools that copy metadata often leave."""
    try:
        return ImageOps.exif_transpose(picture)
    except _DAMAGED_EXIF:
        picture.load()
        return picture


def _levels(values: np.ndarray, name: str, setting: str) -> np.ndarray:
    """Grey of 16 or 32 bits, or floating point, as 8 bits: by the range that such files have."""
    low, high = float(values.min()), float(values.max())
    whole = np.issubdtype(values.dtype, np.integer)
    if whole and values.dtype.itemsize == 2:
        scale = 257.0
    elif whole:
        scale = next((top / 255 for top in (255, 2**16 - 1, 2**31 - 1, 2**32 - 1) if high <= top), 0.0)
    else:
        scale = 1 / 255 if high <= 1 else 1.0 if high <= 255 else 0.0
    if not (low >= 0 and scale):  # NaN as well
        raise RequestError(
            setting,
            f"{_printable(name)} has grey values from {low:g} to {high:g}; expected integers from 0, or floating point "
            f"from 0 to 1",
        )
    return (values.astype(np.float64) / scale).clip(0, 255).round().astype(np.uint8)


def on_white(picture: Image.Image) -> Image.Image:
    """A normalised picture as RGB, its transparency on white. Always a copy."""
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size -> (B, 3, H, W) float32 in [-1, 1]."""
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def as_mask(picture: Image.Image) -> Image.Image:
    """A normalised picture as a mask in mode L, white where to paint.

    Editors make masks as strokes on a transparent layer: light strokes are painted, so they are put on black; dark
    strokes are kept, so they are put on white.
    """
    if picture.mode != "RGBA":
        return picture.convert("L")
    levels, alpha = np.asarray(picture.convert("RGB").convert("L")), np.asarray(picture.getchannel("A"))
    if bool((alpha == 255).all()) or not bool((alpha > 0).any()) or int(levels[alpha > 0].max()) < 128:
        return on_white(picture).convert("L")
    return Image.fromarray((levels.astype(np.float64) * alpha / 255).round().astype(np.uint8))


def mask_to_tensor(picture: Image.Image) -> Tensor:
    """A mask, white where to paint -> (1, 1, H, W) of 0 and 1."""
    return torch.from_numpy(np.array(picture.convert("L"))).float()[None, None].div(255).round()


def to_pictures(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W), clamped to [-1, 1] -> pictures; each value is rounded to the nearest of 256 levels."""
    levels = images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return [Image.fromarray(each) for each in levels.permute(0, 2, 3, 1).cpu().numpy()]


def fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`picture` at (width, height): scaled to cover it, then cropped equally on both sides."""
    if picture.size == size:
        return picture
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def _unreadable(error: Exception, name: str, setting: str) -> RequestError:
    kinds = "PNG, JPEG, WebP, BMP, TIFF and AVIF are"
    # Pillow's own words for a file that it does not know have the address of an object in memory.
    why = "" if isinstance(error, UnidentifiedImageError) else f" ({_printable(error)})"
    return RequestError(setting, f"{_printable(name)} is not a picture that can be read; {kinds}{why}")


def _printable(value: object) -> str:
    return printable(str(value), limit=1000)

"""Pictures as values: paths, bytes, PIL images and arrays are opened once and passed on as an `InputImage`."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from gouache.errors import RequestError
from gouache.images import pixels


@dataclass(frozen=True)
class InputImage:
    """A picture given to a request. Two are equal if their `sha256` is.

    `image` is upright, 8 bits, in mode L, RGB or RGBA (alpha is kept, so that a mask can use it); do not change it.
    `sha256` (hex) is that of the file's bytes if it was read from a path or from bytes; if it was given as a PIL image
    or array, that of the mode, size and pixels of `image`. `path` is the file it was read from, if any.
    """

    image: Image.Image = field(compare=False)
    sha256: str
    path: Path | None = field(default=None, compare=False)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.image.size

    def rgb(self) -> Image.Image:
        """A copy as RGB, transparency on white."""
        return pixels.on_white(self.image)

    def __repr__(self) -> str:
        width, height = self.size
        return f"InputImage({width}x{height} {self.image.mode}, sha256={self.sha256[:12]}, path={self.path})"


ImageLike: TypeAlias = InputImage | str | os.PathLike[str] | bytes | Image.Image | np.ndarray


def input_image(value: ImageLike, setting: str) -> InputImage:
    """`value` as an InputImage: a path, the bytes of an image file, a PIL image or a NumPy array.

    Arrays are (H, W), (H, W, 3) or (H, W, 4): uint8 in 0..255, float in 0..1, or bool (true is white). Raises
    RequestError for `setting` if it is none of these or cannot be read.
    """
    if isinstance(value, InputImage):
        return value
    if isinstance(value, str | os.PathLike):
        path = Path(os.path.abspath(value))  # noqa: PTH100  # recorded, for another working folder; links are kept
        data = pixels.read_bytes(path, setting)
        return InputImage(pixels.decode(data, str(path), setting), hashlib.sha256(data).hexdigest(), path)
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        return InputImage(pixels.decode(data, "the given data", setting), hashlib.sha256(data).hexdigest())
    if isinstance(value, np.ndarray):
        value = _from_array(value, setting)
    if isinstance(value, Image.Image):
        image = pixels.normalise(value, "the given image", setting)
        header = f"{image.mode} {image.width}x{image.height}\n".encode()
        return InputImage(image, hashlib.sha256(header + image.tobytes()).hexdigest())
    raise RequestError(
        setting,
        f"expected a path, the bytes of an image file, a PIL image or an array; received {type(value).__name__}",
    )


def _from_array(array: np.ndarray, setting: str) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        raise RequestError(
            setting, f"the given array has shape {array.shape}; expected (H, W), (H, W, 3) or (H, W, 4), not empty"
        )
    if array.shape[0] * array.shape[1] > pixels.MAX_PIXELS:
        raise RequestError(setting, f"the given array has {array.shape[1]}x{array.shape[0]} pixels; at most 64 million")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # false for NaN as well
            raise RequestError(setting, f"the given float array has values from {low:g} to {high:g}; expected 0 to 1")
        array = (array.astype(np.float64) * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise RequestError(
            setting, f"the given array has dtype {array.dtype}; expected uint8 (0 to 255), float (0 to 1) or bool"
        )
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and channels == 1 else array))

"""Pictures as files and as tensors, compared with the pixels that Pillow and NumPy give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gouache.images import pixels


def two_halves(size: tuple[int, int], left: str = "red", right: str = "blue") -> Image.Image:
    """A picture whose left and right halves have one colour each."""
    picture = Image.new("RGB", size, right)
    picture.paste(left, (0, 0, size[0] // 2, size[1]))
    return picture


def assert_same(picture: Image.Image, expected: Image.Image, tolerance: int = 0) -> None:
    assert picture.mode == "RGB" and picture.size == expected.size
    difference = np.asarray(picture, np.int16) - np.asarray(expected.convert("RGB"), np.int16)
    assert np.abs(difference).max() <= tolerance


def test_all_256_levels_are_kept_in_a_tensor_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(np.stack([levels, levels.T, 255 - levels], axis=2))

    tensor = pixels.to_tensor([picture, picture])

    assert tensor.shape == (2, 3, 16, 16) and tensor.min() == -1 and tensor.max() == 1
    for back in pixels.to_pictures(tensor):
        assert_same(back, picture)


def test_values_outside_the_range_are_clamped():
    tensor = torch.tensor([-5.0, -1.0, 0.0, 1.0, 7.0]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)

    (picture,) = pixels.to_pictures(tensor)

    assert np.asarray(picture)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    ("orientation", "transpose"),
    [(1, None), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)],
)
def test_exif_orientation_is_applied(orientation: int, transpose: Image.Transpose | None, tmp_path: Path):
    """A camera stores the pixels in the order of the sensor, and the rotation in EXIF 2.3, tag 0x0112."""
    upright, exif = two_halves((64, 32)), Image.Exif()
    exif[0x0112] = orientation
    stored = upright if transpose is None else upright.transpose(transpose)
    stored.save(tmp_path / "photo.jpg", exif=exif, quality=100, subsampling=0)

    assert_same(pixels.read(tmp_path / "photo.jpg", "init"), upright, tolerance=8)


def test_transparent_pixels_become_white(tmp_path: Path):
    expected = two_halves((16, 8), left="white", right="#808080")
    clear = expected.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 8, 8))
    palette = two_halves((16, 8), left="black", right="#808080").quantize(4)
    forms: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgba.png": (clear, {}),
        "grey.png": (clear.convert("LA"), {}),
        "palette.png": (palette, {"transparency": palette.getpixel((0, 0))}),
        "lossless.webp": (clear, {"lossless": True}),
    }

    for name, (picture, options) in forms.items():
        picture.save(tmp_path / name, **options)

        assert_same(pixels.read(tmp_path / name, "init"), expected)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGB"])
def test_every_pixel_mode_becomes_rgb(mode: str, tmp_path: Path):
    picture = two_halves((16, 8), left="black", right="white")
    name = "picture.tiff" if mode == "CMYK" else "picture.png"
    picture.convert(mode).save(tmp_path / name)

    assert_same(pixels.read(tmp_path / name, "init"), picture, tolerance=1)


@pytest.mark.parametrize("name", ["depth.png", "depth.tiff"])
def test_sixteen_bits_are_scaled_to_eight(name: str, tmp_path: Path):
    """Depth maps often have 16 bits. Pillow's own conversion would clip at 255."""
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(levels * 257).save(tmp_path / name)

    assert_same(pixels.read(tmp_path / name, "depth"), Image.fromarray(levels.astype(np.uint8)))


def test_fit_scales_to_cover_and_crops_equally():
    wide = Image.new("RGB", (256, 64), "white")
    wide.paste("red", (64, 0, 192, 64))

    fitted = pixels.fit(wide, (128, 64))

    assert_same(fitted, Image.new("RGB", (128, 64), "red"), tolerance=0)
    assert pixels.fit(wide, (32, 32)).size == (32, 32)
    assert pixels.fit(wide, (256, 64)) is wide


def test_a_mask_is_rounded_to_0_and_1():
    greys = Image.fromarray(np.array([[0, 100, 127, 128, 200, 255]], np.uint8))

    mask = pixels.mask_to_tensor(greys)

    assert mask.tolist() == [[[[0, 0, 0, 1, 1, 1]]]]

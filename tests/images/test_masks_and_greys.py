"""Masks as editors save them, and greys of more than 8 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, PngImagePlugin

from gouache.errors import RequestError
from gouache.images import pixels
from gouache.images.input_image import input_image


def strokes(mode: str, ink: tuple[int, ...], paper: tuple[int, ...]) -> Image.Image:
    picture = Image.new(mode, (16, 16), paper)
    ImageDraw.Draw(picture).rectangle((4, 4, 7, 11), fill=ink)
    return picture


WANTED = np.zeros((16, 16))
WANTED[4:12, 4:8] = 255


@pytest.mark.parametrize(
    ("picture", "inverted"),
    [
        (strokes("RGBA", (255, 255, 255, 255), (255, 255, 255, 0)), False),
        (strokes("RGBA", (255, 255, 255, 255), (0, 0, 0, 0)), False),
        (strokes("LA", (255, 255), (0, 0)), False),
        (strokes("RGBA", (255, 255, 255, 255), (0, 0, 0, 255)), False),
        (strokes("RGBA", (0, 0, 0, 255), (0, 0, 0, 0)), True),
        (strokes("L", (255,), (0,)), False),
        (strokes("RGB", (0, 0, 0), (255, 255, 255)), True),
    ],
)
def test_light_strokes_are_painted_and_dark_ones_kept(picture: Image.Image, inverted: bool):
    mask = np.asarray(pixels.as_mask(input_image(picture, "mask").image))

    np.testing.assert_array_equal(mask, 255 - WANTED if inverted else WANTED)


RAMP = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize(
    ("values", "tolerance"),
    [
        (RAMP.astype(np.float32), 0),
        ((RAMP * 255).astype(np.float32), 0),
        ((RAMP * 255).round().astype(np.int32), 0),
        ((RAMP * 65535).round().astype(np.int32), 0),
        ((RAMP * (2**31 - 1)).astype(np.int32), 1),
        ((RAMP * 65535).round().astype(np.uint16), 0),
    ],
)
def test_greys_of_more_than_eight_bits_are_scaled(values: np.ndarray, tolerance: int, tmp_path: Path):
    Image.fromarray(values).save(tmp_path / "grey.tiff")

    found = np.asarray(input_image(tmp_path / "grey.tiff", "depth").image)

    assert np.abs(found.astype(int) - np.arange(256).reshape(16, 16)).max() <= tolerance


@pytest.mark.parametrize("values", [RAMP - 0.5, RAMP * 1000, RAMP * np.nan, -RAMP * 5])
def test_greys_without_a_known_range_are_refused(values: np.ndarray, tmp_path: Path):
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "grey.tiff")

    with pytest.raises(RequestError, match=r"depth: .*grey values from"):
        input_image(tmp_path / "grey.tiff", "depth")


@pytest.mark.parametrize("exif", [b"b'Exif\\x00'", b"II*\x00", b"", b"MM\x00*\xff\xff\xff\xff"])
def test_broken_exif_in_a_png_costs_the_orientation_only(exif: bytes, tmp_path: Path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"eXIf", exif)
    picture = Image.effect_noise((16, 16), 50)
    picture.save(tmp_path / "a.png", pnginfo=chunks)

    found = input_image(tmp_path / "a.png", "init").image

    np.testing.assert_array_equal(np.asarray(found), np.asarray(picture))

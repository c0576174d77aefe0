"""Sizes from headers, compared with the pictures that Pillow decodes and turns upright."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from gouache.errors import RequestError
from gouache.images import pixels


def with_chunk_at_the_end(png: bytes, name: bytes, data: bytes) -> bytes:
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return png[:-12] + chunk + png[-12:]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "avif"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8, 99])
def test_the_size_is_that_of_the_upright_picture(suffix: str, orientation: int | None, tmp_path: Path):
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.new("RGB", (31, 17), "teal").save(path, exif=exif)

    with Image.open(path) as picture:
        expected = ImageOps.exif_transpose(picture).size
    assert pixels.read_size(path, "data") == expected
    assert pixels.read(path, "data").size == expected


@pytest.mark.parametrize("name", ["eXIf", "iTXt"])
def test_an_orientation_behind_the_pixels_of_a_png_counts(name: str, tmp_path: Path):
    path, exif = tmp_path / "a.png", Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (31, 17)).save(path)
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    data = exif.tobytes().removeprefix(b"Exif\0\0") if name == "eXIf" else xmp
    path.write_bytes(with_chunk_at_the_end(path.read_bytes(), name.encode(), data))

    assert pixels.read(path, "data").size == (17, 31)  # as it is painted from
    assert pixels.read_size(path, "data") == (17, 31)


def test_the_pixels_are_not_decoded(tmp_path: Path):
    path = tmp_path / "a.png"
    Image.effect_noise((400, 300), 50).save(path)
    path.write_bytes(path.read_bytes()[:5000])

    assert pixels.read_size(path, "data") == (400, 300)
    with pytest.raises(RequestError):
        pixels.read(path, "data")


def test_what_is_not_a_picture_is_one_line(tmp_path: Path):
    text, pipe = tmp_path / "a.png", tmp_path / "b.png"
    text.write_text("hello")
    os.mkfifo(pipe)
    huge = tmp_path / "c.png"
    huge.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBBI", 13, b"IHDR", 60000, 60000, 8, 2, 0, 0, 0, 0))
    for path in (text, pipe, tmp_path, tmp_path / "missing.png", huge):
        with pytest.raises(RequestError, match=r"^data: ") as caught:
            pixels.read_size(path, "data")
        assert "\n" not in str(caught.value)

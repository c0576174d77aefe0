"""Input pictures as paths, bytes, PIL images and arrays."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gouache.errors import RequestError
from gouache.images import pixels
from gouache.images.input_image import InputImage, input_image


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)


def png(picture: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_a_path_and_its_bytes_give_the_same_picture_and_the_hash_of_the_file(tmp_path: Path):
    path, data = tmp_path / "picture.png", png(Image.fromarray(noise(6, 8, 3)))
    path.write_bytes(data)

    read = [input_image(form, "init") for form in (path, str(path), data, bytearray(data), memoryview(data))]

    assert {each.sha256 for each in read} == {hashlib.sha256(data).hexdigest()}
    assert [each.path for each in read] == [path, path, None, None, None]
    for each in read:
        assert each == read[0] and hash(each) == hash(read[0]) and each.size == (8, 6)
        assert np.array_equal(np.asarray(each.image), noise(6, 8, 3))


def test_an_input_image_is_returned_as_it_is():
    given = input_image(noise(4, 4), "init")

    assert input_image(given, "mask") is given


@pytest.mark.parametrize(("shape", "mode"), [((5, 4), "L"), ((5, 4, 1), "L"), ((5, 4, 3), "RGB"), ((5, 4, 4), "RGBA")])
def test_arrays_of_integers_and_floats_are_the_picture_of_the_same_pixels(shape: tuple[int, ...], mode: str):
    levels = noise(*shape)

    found = input_image(levels, "init")

    assert found.image.mode == mode and found.path is None
    assert np.array_equal(np.asarray(found.image), levels.squeeze(-1) if shape[-1] == 1 else levels)
    for form in (levels / 255, (levels / 255).astype(np.float32), levels[::1].copy(order="F"), found.image):
        assert input_image(form, "init") == found


def test_a_bool_array_is_black_and_white():
    found = input_image(np.array([[True, False]]), "mask")

    assert np.asarray(found.image).tolist() == [[255, 0]]


def test_the_hash_of_pixels_depends_on_mode_size_and_pixels():
    levels = noise(4, 6)
    grey = Image.fromarray(levels)
    changed = levels.copy()
    changed[3, 5] ^= 1
    forms = [grey, grey.convert("RGB"), grey.convert("RGBA"), levels.reshape(6, 4), levels.reshape(2, 12), changed]

    assert len({input_image(form, "init") for form in forms}) == len(forms)


def test_alpha_is_kept_and_rgb_puts_it_on_white():
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 255, 0))
    grey = Image.new("LA", (2, 1), (40, 255))
    grey.putpixel((1, 0), (90, 0))

    found, second = input_image(png(picture), "init"), input_image(grey, "init")

    assert found.image.getchannel("A").tobytes() == second.image.getchannel("A").tobytes() == b"\xff\x00"
    assert found.rgb().tobytes() == b"\xff\x00\x00\xff\xff\xff"
    assert second.rgb().tobytes() == b"\x28\x28\x28\xff\xff\xff"


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "La", "CMYK", "YCbCr", "LAB", "HSV"]
)
def test_a_pil_image_of_any_mode_becomes_grey_rgb_or_rgba(mode: str):
    found = input_image(Image.new(mode, (3, 2)), "init")

    expected = {"1": "L", "L": "L", "LA": "RGBA", "La": "RGBA", "PA": "RGBA", "RGBA": "RGBA", "RGBa": "RGBA"}
    assert found.image.mode == expected.get(mode, "RGB") and found.rgb().mode == "RGB"


def test_a_sixteen_bit_image_is_scaled():
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)

    found = input_image(Image.fromarray(levels * 257), "depth")

    assert np.array_equal(np.asarray(found.image), levels)


def test_a_pil_image_with_an_orientation_is_turned_upright():
    stored = Image.fromarray(noise(4, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = Image.open(io.BytesIO(png(stored, exif=exif)))

    assert input_image(opened, "init").size == input_image(png(stored, exif=exif), "init").size == (4, 6)


def test_later_changes_to_the_given_image_or_array_have_no_effect():
    array, picture = noise(4, 4, 3), Image.fromarray(noise(4, 4, 3))
    found, second = input_image(array, "init"), input_image(picture, "init")

    array[:] = 0
    picture.paste("black", (0, 0, 4, 4))

    assert np.array_equal(np.asarray(found.image), noise(4, 4, 3))
    assert np.array_equal(np.asarray(second.image), noise(4, 4, 3))


def test_read_is_the_same_picture_on_white(tmp_path: Path):
    path = tmp_path / "picture.png"
    Image.fromarray(noise(5, 7, 4)).save(path)

    assert pixels.read(path, "init").tobytes() == input_image(path, "init").rgb().tobytes()


def test_unreadable_input_is_a_one_line_error_with_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = png(Image.fromarray(noise(64, 64, 3)))
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(pixels, "MAX_PIXELS", 5000)
    cases = {
        tmp_path / "absent.png": "there is no file",
        tmp_path / "two\nlines.png": r"there is no file .*two\\x0alines\.png",
        "null\0.png": "cannot be read",
        tmp_path: "is a folder",
        tmp_path / "half.png": "is not a picture that can be read",
        b"<html>": "the given data is not a picture that can be read",
        b"": "the given data is not a picture that can be read",
    }
    for value, message in cases.items():
        with pytest.raises(RequestError, match=rf"^init: [^\n]*{message}[^\n]*$") as refused:
            input_image(value, "init")
        assert "BytesIO" not in str(refused.value)

    others = [
        (noise(80, 80), "the given array has 80x80 pixels; at most"),
        (Image.new("L", (80, 80)), "the given image has 80x80 pixels; at most"),
        (png(Image.new("L", (80, 80))), "the given data has 80x80 pixels; at most"),
        (Image.new("L", (0, 3)), "the given image has 0x3 pixels; at least"),
        (noise(3, 8, 8), r"the given array has shape \(3, 8, 8\); expected \(H, W\)"),
        (np.zeros((0, 4)), r"the given array has shape \(0, 4\)"),
        (np.zeros(4), r"the given array has shape \(4,\)"),
        (np.full((2, 2), 1.5), "the given float array has values from 1.5 to 1.5; expected 0 to 1"),
        (np.full((2, 2), np.nan), "the given float array has values from nan to nan"),
        (np.zeros((2, 2), np.int32), "the given array has dtype int32; expected uint8"),
        (["a.png"], "expected a path, the bytes of an image file, a PIL image or an array; received list"),
        (None, "received NoneType"),
    ]
    for value, message in others:
        with pytest.raises(RequestError, match=rf"^mask: [^\n]*{message}[^\n]*$"):
            input_image(value, "mask")  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")

    with pytest.raises(RequestError, match=r"^init: .*pipe\.png is not a regular file; a picture is expected$"):
        input_image(tmp_path / "pipe.png", "init")


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pixels, "MAX_BYTES", 1_000_000)
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(2_000_000)

    with pytest.raises(RequestError, match=r"^init: .*large\.png has 2 MB; at most 1 MB$"):
        input_image(tmp_path / "large.png", "init")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on TIFF
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF", "BMP", "JPEG"])
def test_damaged_files_are_request_errors_and_nothing_else(file_format: str):
    """Pillow's decoders raise many types of exceptions on damaged data."""
    buffer = io.BytesIO()
    Image.fromarray(noise(20, 20, 3)).save(buffer, file_format)
    whole, random = buffer.getvalue(), np.random.default_rng(11)

    for _ in range(150):
        damaged = bytearray(whole)
        for position in random.integers(0, min(len(whole), 200), 3):
            damaged[position] = random.integers(0, 256)
        try:
            found = input_image(bytes(damaged), "init")
        except RequestError as error:
            assert "\n" not in str(error)
        else:
            assert isinstance(found, InputImage)

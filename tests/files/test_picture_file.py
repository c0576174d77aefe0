"""Embeddings in pictures: written here in A1111's documented format, and read back."""

from __future__ import annotations

import base64
import io
import json
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from gouache.errors import DamagedFile, NotAModel
from gouache.families.identify import identify
from gouache.files.open import open_model

VECTORS = np.random.default_rng(0).standard_normal((3, 768)).astype(np.float32)


def content(vectors: np.ndarray = VECTORS) -> dict[str, Any]:
    param = {"*": {"TORCHTENSOR": vectors.tolist()}}
    return {"string_to_token": {"*": 265}, "string_to_param": param, "name": "fox", "step": 500}


def picture(size: int = 256) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(1, 255, (size, size, 3)).astype(np.uint8))


def with_chunk(path: Path, text: str) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "something else")
    info.add_text("sd-ti-embedding", text)
    picture().save(path, pnginfo=info)
    return path


def mask(count: int) -> np.ndarray:
    numbers, state = [], 0
    for _ in range(count):
        state = (1664525 * state + 1013904223) % 2**32
        numbers.append(state % 255)
    return np.array(numbers, np.uint8) & 0x0F


def in_pixels(raw: bytes, height: int = 256) -> Image.Image:
    """Stripes left and right of a picture, separated by black columns, with four bits of each byte on either side."""
    packed = np.frombuffer(raw, np.uint8)
    row = height * 3
    packed = np.resize(packed, -(-(len(packed) + 1) // row) * row)
    stripes = []
    for half in (packed & 0x0F, packed >> 4):
        masked = half ^ mask(half.size)
        # The upper bits are unused; here they prevent black pixels.
        stripes.append((masked | 0x40).reshape(height, -1, 3))
    wide = stripes[0].shape[1]
    whole = np.zeros((height, 2 * wide + 256 + 2, 3), np.uint8)
    whole[:, :wide], whole[:, wide + 1 : wide + 257] = stripes[0], np.asarray(picture(256).resize((256, height)))
    whole[:, wide + 258 :] = stripes[1]
    return Image.fromarray(whole)


def test_a_text_chunk_is_read(tmp_path: Path):
    text = base64.b64encode(json.dumps(content()).encode()).decode()

    file = open_model(with_chunk(tmp_path / "fox.png", text))

    assert list(file) == ["string_to_param.*"] and file.extra["string_to_token"] == {"*": 265}
    assert torch.equal(file.tensor("string_to_param.*"), torch.from_numpy(VECTORS))
    assert identify(file).kind.value == "embedding" and file.extra["name"] == "fox"


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_pixels_are_read(tmp_path: Path, kind: str):
    raw = zlib.compress(json.dumps(content()).encode(), 9)
    path = tmp_path / f"fox.{kind.lower()}"
    in_pixels(raw).save(path, kind, **({"lossless": True} if kind == "WEBP" else {}))

    file = open_model(path)

    assert torch.equal(file.tensor("string_to_param.*"), torch.from_numpy(VECTORS))
    assert file.notes == ("the embedding is stored in the pixels of a picture",)


def test_an_ordinary_picture_is_reported_as_a_picture(tmp_path: Path):
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "a.webp")
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")

    for name in ("a.png", "a.webp", "black.png"):
        with pytest.raises(NotAModel, match="picture, not a model"):
            open_model(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!!", "not valid base64"),
        (base64.b64encode(b"{").decode(), "not valid JSON"),
        (base64.b64encode(json.dumps(content(VECTORS[:1])).encode("utf-16")).decode(), "not valid JSON"),
        (base64.b64encode(b"[1]").decode(), "is not a JSON object"),
        (
            base64.b64encode(json.dumps({"a": {"TORCHTENSOR": [[1, 2], [3]]}}).encode()).decode(),
            "not a matrix",
        ),
        (base64.b64encode(json.dumps({"a": {"TORCHTENSOR": [["x"]]}}).encode()).decode(), "other than numbers"),
        (base64.b64encode(json.dumps({"a": 1}).encode()).decode(), "without vectors"),
    ],
)
def test_the_error_states_the_damage(tmp_path: Path, text: str, message: str):
    with pytest.raises((DamagedFile, NotAModel), match=message):
        open_model(with_chunk(tmp_path / "a.png", text))


def test_a_decompression_bomb_is_not_inflated(tmp_path: Path):
    bomb = zlib.compress(b" " * 400_000_000, 9)
    in_pixels(bomb[:200_000] if len(bomb) > 200_000 else bomb, 512).save(tmp_path / "a.png")

    with pytest.raises((DamagedFile, NotAModel)):
        open_model(tmp_path / "a.png")


def test_the_largest_stripes_are_decoded_in_bounded_time(tmp_path: Path):
    """A few kilobytes that expand to sixteen million masked numbers."""
    stripes = np.full((4000, 2 * 666 + 2, 3), 0x41, np.uint8)
    stripes[:, 666:668] = 0x40  # the separating columns; no pixel may be black
    Image.fromarray(stripes).save(tmp_path / "a.png")
    began = time.process_time()

    with pytest.raises(NotAModel, match="a PNG picture"):
        open_model(tmp_path / "a.png")

    assert time.process_time() - began < 2


def test_every_truncation_of_a_picture_is_a_known_error_or_gives_the_whole_embedding(tmp_path: Path):
    buffer = io.BytesIO()
    in_pixels(zlib.compress(json.dumps(content(VECTORS[:1])).encode(), 9), 64).save(buffer, "PNG")
    whole = buffer.getvalue()

    for end in range(0, len(whole), max(1, len(whole) // 40)):
        (tmp_path / "a.png").write_bytes(whole[:end])
        try:
            file = open_model(tmp_path / "a.png")
        except (DamagedFile, NotAModel):
            continue
        # A picture without its last bytes may still have all its pixels.
        assert torch.equal(file.tensor("string_to_param.*"), torch.from_numpy(VECTORS[:1]))

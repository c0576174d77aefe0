"""Files written for `torch.load`: read by torch, memory-mapped, by zip tools, and by our reader."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gouache.errors import ModelError
from gouache.files.open import open_model
from gouache.files.record import TensorInfo
from gouache.files.torch_write import stream_torch
from gouache.files.write import describe

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip
SHAPES = ((), (0, 3), (5,), (2, 3, 4), (1, 1))


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{str(dtype)[6:]}.{'x'.join(map(str, shape))}": (torch.randn(shape, generator=generator) * 3).to(dtype)
        for dtype in DTYPES
        for shape in SHAPES
    }


def written(path: Path, tensors: dict[str, Tensor], values: dict[str, Any] | None = None) -> Path:
    stream_torch(path, {name: describe(each) for name, each in tensors.items()}, tensors.__getitem__, values)
    return path


def equal(a: Tensor, b: Tensor) -> bool:
    bits = lambda x: x.contiguous().view(-1).view(torch.uint8)  # noqa: E731
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_reads_every_tensor(tmp_path: Path, mapped: bool):
    tensors = some_tensors()

    found = torch.load(written(tmp_path / "a.ckpt", tensors), weights_only=True, mmap=mapped)["state_dict"]

    assert list(found) == list(tensors) and all(equal(found[name], tensors[name]) for name in tensors)


def test_our_reader_reads_every_tensor(tmp_path: Path):
    tensors = some_tensors()

    file = open_model(written(tmp_path / "a.ckpt", tensors))

    assert file.format == "torch zip" and not file.notes
    assert all(equal(file.tensor(name), tensors[name]) for name in tensors)


def test_the_archive_is_valid_and_its_tensors_begin_at_multiples_of_64_bytes(tmp_path: Path):
    path = written(tmp_path / "a.ckpt", some_tensors())

    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for member in archive.infolist():
            assert member.compress_type == zipfile.ZIP_STORED
            with path.open("rb") as file:
                file.seek(member.header_offset + 26)
                name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            assert (member.header_offset + 30 + name + extra) % 64 == 0


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=10).filter(lambda key: key != "state_dict"), plain, max_size=4))
def test_plain_values_are_preserved(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]):
    path = written(tmp_path_factory.mktemp("values") / "a.ckpt", {"w": torch.ones(2)}, values)

    found = torch.load(path, weights_only=True)

    assert {key: value for key, value in found.items() if key != "state_dict"} == values


def test_other_values_are_refused_and_no_file_is_left(tmp_path: Path):
    for value in (object(), {1, 2}, b"bytes", torch.ones(1)):
        with pytest.raises(ModelError, match=r"which cannot be written into a \.ckpt"):
            written(tmp_path / "a.ckpt", {"w": torch.ones(2)}, {"x": value})
    with pytest.raises(ModelError, match="state_dict"):
        written(tmp_path / "a.ckpt", {}, {"state_dict": 1})
    with pytest.raises(ModelError, match=r"is F32 \[2\], expected F32 \[3\]"):
        stream_torch(tmp_path / "a.ckpt", {"w": TensorInfo((3,), "F32")}, lambda name: torch.ones(2))
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_offsets_beyond_four_gigabytes_are_written(tmp_path: Path):
    piece = torch.arange(300_000_000, dtype=torch.int64) % 251
    infos = {f"t{n}": TensorInfo((600_000_000,), "U8") for n in range(8)}

    stream_torch(tmp_path / "a.ckpt", infos, lambda name: (piece.repeat(2) + int(name[1:])).to(torch.uint8))

    found = torch.load(tmp_path / "a.ckpt", weights_only=True, mmap=True)["state_dict"]
    ours = open_model(tmp_path / "a.ckpt")
    for n in (0, 7):
        last = found[f"t{n}"][-1]
        assert int(last) == (299_999_999 % 251 + n) % 256 == int(ours.tensor(f"t{n}")[-1])
    assert math.prod(found["t7"].shape) == 600_000_000

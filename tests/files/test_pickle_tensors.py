"""Files that torch.save writes are read bit for bit as torch.load reads them, without torch.load."""

from __future__ import annotations

import collections
import io
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from gouache.files.open import open_model
from gouache.files.record import ModelFile

from . import assemble as a

BOTH_FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def values() -> dict[str, Any]:
    """Tensors in every shape, dtype and memory layout that checkpoints contain."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(6, 8, generator=generator)
    shared = torch.arange(24.0)
    attributed = torch.ones(3)
    attributed.note = "an attribute"  # type: ignore[attr-defined]
    parameter = nn.Parameter(torch.randn(4, generator=generator))
    parameter.note = "another"  # type: ignore[attr-defined]
    dtypes = [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e4m3fn,
        torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    ]  # fmt: skip
    found: dict[str, Any] = {str(dtype): (base * 9).abs().to(dtype) for dtype in dtypes}
    return found | {
        "bool": base > 0,
        "scalar": torch.tensor(3.25),
        "int scalar": torch.tensor(7),
        "empty": torch.empty(0, 5),
        "one of 1x1x1": torch.ones(1, 1, 1),
        "transposed": base.t(),
        "sliced": base[1:4, 2:7:2],
        "channels last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "expanded": torch.arange(3.0).expand(4, 3),
        "head of shared": shared[:10].view(2, 5),
        "tail of shared": shared[4:],
        "parameter": nn.Parameter(base.clone()),
        "frozen parameter": nn.Parameter(base.clone(), requires_grad=False),
        "parameter with state": parameter,
        "with an attribute": attributed,
        "buffer": nn.Buffer(torch.ones(2)),
        "modules": nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).state_dict(),
        "list": [torch.zeros(2), (torch.ones(3), {"deep": torch.full((2,), 2.0)})],
        "ordered": collections.OrderedDict(a=torch.zeros(1), b=torch.ones(1)),
        "parameter dict": nn.ParameterDict({"x": nn.Parameter(torch.ones(2)), "y": nn.Parameter(torch.zeros(3))}),
        "parameter list": nn.ParameterList([nn.Parameter(torch.full((2,), 3.0))]),
    }


def flattened(value: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors in a result of torch.load, named by the keys on the path to them."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, nn.ParameterDict | nn.ParameterList):
        value = dict(value.named_parameters())
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {
        key: tensor
        for inner, item in items
        for key, tensor in flattened(item, f"{name}.{inner}" if name else str(inner)).items()
    }


def save(path: Path, value: Any, zipped: bool = True, **options: Any) -> Any:
    """Writes `value` and returns what torch.load reads back."""
    torch.save(value, path, _use_new_zipfile_serialization=zipped, **options)
    return torch.load(path, weights_only=False)


def assert_same_tensors(file: ModelFile, expected: dict[str, Tensor]) -> None:
    assert set(file.tensors) == set(expected)
    for name, tensor in expected.items():
        found = file.tensor(name)
        info = file.tensors[name]
        assert (found.dtype, found.shape, info.shape) == (tensor.dtype, tensor.shape, tuple(tensor.shape)), name
        found_bytes = found.contiguous().view(-1).view(torch.uint8)
        assert found_bytes.equal(tensor.detach().contiguous().view(-1).view(torch.uint8)), name
        assert found.stride() == tensor.stride() or 1 in tensor.shape or tensor.numel() == 0, name
        assert not found.requires_grad


@BOTH_FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_kind_of_tensor_is_read_as_by_torch(tmp_path: Path, zipped: bool, protocol: int):
    path = tmp_path / "values.ckpt"
    written = values()
    if not zipped:  # torch can write these dtypes in its legacy format, but cannot read them back
        written = {name: value for name, value in written.items() if "float8" not in name and "uint" not in name}
    expected = flattened(save(path, written, zipped, pickle_protocol=protocol))

    file = open_model(path)

    assert file.format == ("torch zip" if zipped else "torch legacy")
    assert_same_tensors(file, expected)


@BOTH_FORMATS
def test_tensors_that_share_memory_still_share_it(tmp_path: Path, zipped: bool):
    whole = torch.arange(24.0)
    save(tmp_path / "shared.pt", {"whole": whole, "part": whole[4:8]}, zipped)
    file = open_model(tmp_path / "shared.pt")

    part, all_of_it = file.tensor("part"), file.tensor("whole")
    part.fill_(-1)

    assert all_of_it[3:9].tolist() == [3, -1, -1, -1, -1, 8]


def test_changing_a_tensor_does_not_change_the_file(tmp_path: Path):
    save(tmp_path / "w.ckpt", {"w": torch.arange(1000.0)})
    before = (tmp_path / "w.ckpt").read_bytes()

    open_model(tmp_path / "w.ckpt").tensor("w").fill_(7)

    assert (tmp_path / "w.ckpt").read_bytes() == before


def test_a_single_tensor_and_a_list_get_names(tmp_path: Path):
    save(tmp_path / "one.pt", torch.arange(3))
    save(tmp_path / "list.pt", [torch.zeros(1), torch.ones(2)])

    assert list(open_model(tmp_path / "one.pt")) == ["tensor"]
    assert list(open_model(tmp_path / "list.pt")) == ["0", "1"]


@pytest.mark.parametrize("content", [
    a.torch_zip(), a.legacy(a.legacy_pickle(), ["77"], (4, a.FLOATS)), a.torch_tar(),
], ids=["torch zip", "torch legacy", "torch tar"])  # fmt: skip
def test_assembled_files_are_read_as_by_torch(tmp_path: Path, content: bytes, request: pytest.FixtureRequest):
    path = tmp_path / "assembled.pt"
    path.write_bytes(content)
    expected = torch.load(path, weights_only=False)

    file = open_model(path)

    assert f"[{file.format}]" in request.node.name
    assert_same_tensors(file, expected)


def test_a_window_of_a_legacy_storage_is_read_as_by_torch(tmp_path: Path):
    window = a.tuple_of(a.text("78"), a.number(1), a.number(3))
    pickle = a.program(a.dict_of(
        a.text("whole"), a.tensor(a.storage("77", extra=b"N")),
        a.text("part"), a.tensor(a.storage("77", extra=window), (2,), (1,), offset=1),
    ))  # fmt: skip
    (tmp_path / "window.pt").write_bytes(a.legacy(pickle, ["77"], (4, a.FLOATS)))
    expected = torch.load(tmp_path / "window.pt", weights_only=False)

    assert_same_tensors(open_model(tmp_path / "window.pt"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.complex64])
def test_big_endian_files_are_read_as_by_torch(tmp_path: Path, dtype: torch.dtype):
    torch.save({"w": torch.arange(12).to(dtype).view(3, 4).t()}, tmp_path / "little.pt")
    members = a.torch_members(order="big")
    raw = torch.arange(12).to(dtype).view(torch.uint8)
    part = torch.empty(0, dtype=dtype).element_size() // (2 if dtype.is_complex else 1)
    members[2].data = bytes(raw.view(-1, part).flip(1).reshape(-1).numpy())
    kind = {torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat16", torch.int64: "Long",
            torch.complex64: "ComplexFloat"}[dtype]  # fmt: skip
    stored = a.storage(count=12, kind=f"{kind}Storage")
    members[0].data = a.program(a.dict_of(a.text("w"), a.tensor(stored, (4, 3), (1, 4))))
    path = tmp_path / "big.pt"
    path.write_bytes(a.zip_archive(*members))

    assert_same_tensors(open_model(path), torch.load(path, weights_only=True))
    assert_same_tensors(open_model(path), torch.load(tmp_path / "little.pt", weights_only=True))


def test_the_device_of_a_storage_is_ignored(tmp_path: Path):
    pickle = a.good_pickle().replace(a.text("cpu"), a.text("cuda:3"))
    (tmp_path / "cuda.ckpt").write_bytes(a.torch_zip(pickle))

    assert open_model(tmp_path / "cuda.ckpt").tensor("w").tolist() == [[1, 2], [3, 4]]


def test_files_without_checksums_are_read_and_this_is_noted(tmp_path: Path):
    torch.serialization.set_crc32_options(False)
    try:
        expected = save(tmp_path / "unchecked.pt", {"w": torch.arange(5.0)})
    finally:
        torch.serialization.set_crc32_options(True)

    file = open_model(tmp_path / "unchecked.pt")

    assert_same_tensors(file, expected)
    assert any("checksum" in note for note in file.notes)


def test_unaligned_storages_are_read(tmp_path: Path):
    # torch aligns storages; a program that repacks the archive may not.
    for root in ("a", "ab", "abc", "abcd"):
        path = tmp_path / f"{root}.ckpt"
        path.write_bytes(a.torch_zip(root=root))
        assert open_model(path).tensor("w").tolist() == [[1, 2], [3, 4]]


def test_numpy_arrays_become_tensors(tmp_path: Path):
    arrays = {
        "f4": numpy.arange(6, dtype="<f4").reshape(2, 3),
        "big": numpy.arange(6, dtype=">f8").reshape(3, 2),
        "fortran": numpy.asfortranarray(numpy.arange(6, dtype="i8").reshape(2, 3)),
        "scalar": numpy.array(3.5, dtype="f2"),
        "bool": numpy.array([True, False]),
        "empty": numpy.zeros((0, 3), dtype="u1"),
    }
    for protocol in (2, 4, 5):
        torch.save(arrays, tmp_path / "arrays.pt", pickle_protocol=protocol)
        file = open_model(tmp_path / "arrays.pt")
        for name, array in arrays.items():
            assert numpy.array_equal(file.tensor(name).numpy(), array), name
            assert file.tensor(name).numpy().dtype == array.dtype.newbyteorder("="), name


def test_a_plain_pickle_of_arrays_is_read(tmp_path: Path):
    import pickle

    with (tmp_path / "arrays.pkl").open("wb") as stream:
        pickle.dump({"w": numpy.arange(3.0), "epoch": 4}, stream)

    file = open_model(tmp_path / "arrays.pkl")

    assert (file.format, file.extra) == ("pickle", {"epoch": 4})
    assert file.tensor("w").tolist() == [0, 1, 2]


def test_the_zip64_end_record_is_read(tmp_path: Path):
    stream = io.BytesIO()
    tensors = {str(i): torch.full((1,), i, dtype=torch.int32) for i in range(20)}
    torch.save(tensors, stream)
    content = bytearray(stream.getvalue())
    end = len(content) - 22
    assert content[end - 20 : end - 16] == b"PK\6\7", "torch always adds the zip64 records"
    content[end + 8 : end + 20] = b"\xff" * 12  # the plain end record has these values if the numbers do not fit
    (tmp_path / "zip64.pt").write_bytes(content)

    assert_same_tensors(open_model(tmp_path / "zip64.pt"), tensors)


@pytest.mark.full
def test_a_file_of_more_than_four_gigabytes_is_read(tmp_path: Path):
    torch.save({"big": torch.zeros(1 << 29, dtype=torch.float64), "w": torch.arange(5.0)}, tmp_path / "big.ckpt")

    file = open_model(tmp_path / "big.ckpt")

    assert file.tensor("w").tolist() == [0, 1, 2, 3, 4]
    assert file.tensor("big")[-1].item() == 0

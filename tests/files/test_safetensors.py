"""The safetensors reader and writer compared with the safetensors library, in both directions."""

from __future__ import annotations

import gzip
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gouache.errors import FileError
from gouache.files.open import open_model
from gouache.files.record import TensorInfo
from gouache.files.safetensors_file import open_safetensors
from gouache.files.write import write_safetensors

from . import assemble as a

KEYS = Path(__file__).parent.parent / "keys"

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(st.lists(text.filter(lambda name: name != "__metadata__"), max_size=6, unique=True))
    found = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        dtype = draw(st.sampled_from(DTYPES))
        count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
        raw = torch.tensor(list(draw(st.binary(min_size=count, max_size=count))), dtype=torch.uint8)
        found[name] = (raw % 2 if dtype == torch.bool else raw).view(dtype).view(shape)
    return found


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and found[name].shape == tensor.shape and bits(found[name]) == bits(tensor)
        for name, tensor in expected.items()
    )


@settings(deadline=None, max_examples=60)
@given(tensor_sets(), st.dictionaries(text, text, max_size=3))
def test_files_written_by_the_library_are_read_bit_for_bit(tensors: dict[str, Tensor], metadata: dict[str, str]):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        safetensors.torch.save_file(tensors, path, metadata or None)

        file = open_safetensors(path)

        assert same({name: file.tensor(name) for name in file}, tensors)
        assert file.metadata == metadata


@settings(deadline=None, max_examples=60)
@given(tensor_sets(), st.dictionaries(text, text, max_size=3))
def test_the_library_reads_our_files_bit_for_bit(tensors: dict[str, Tensor], metadata: dict[str, str]):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        write_safetensors(path, tensors, metadata)

        with safetensors.safe_open(path, "pt") as file:
            assert same({name: file.get_tensor(name) for name in file.keys()}, tensors)  # noqa: SIM118
            assert (file.metadata() or {}) == metadata


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(tensor_sets())
def test_our_files_are_byte_for_byte_those_of_the_library(tensors: dict[str, Tensor]):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        write_safetensors(path, tensors, {"one": "entry"})

        assert path.read_bytes() == safetensors.torch.save(tensors, {"one": "entry"})


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_damaged_header_is_refused_or_read_as_by_the_library(data: st.DataObject):
    tensors = {"a": torch.arange(3.0), "b.c": torch.ones(2, 2, dtype=torch.float16)}
    content = bytearray(safetensors.torch.save(tensors, {"k": "v"}))
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        path.write_bytes(content)

        try:
            file = open_safetensors(path)
        except FileError as error:
            assert "\n" not in str(error)
            return

        assert same({name: file.tensor(name) for name in file}, safetensors.torch.load(bytes(content)))


def test_tensors_are_mapped_privately_and_without_a_copy(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"w": torch.arange(1000.0)}, path)
    before = path.read_bytes()
    file = open_safetensors(path)

    first, second = file.tensor("w"), file.tensor("w")
    first.fill_(7)

    assert first.data_ptr() == second.data_ptr()
    assert path.read_bytes() == before


def test_tensors_outlive_their_file(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"w": torch.arange(4.0)}, path)
    tensor = open_safetensors(path).tensor("w")

    path.unlink()

    assert tensor.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("pad", range(8))
def test_data_at_any_byte_is_read(tmp_path: Path, pad: int):
    # Other writers than the library do not pad the header, so tensors may begin at any byte.
    path = tmp_path / "m.safetensors"
    path.write_bytes(a.safetensors("{" + a.entry() + "}" + " " * pad, a.FLOATS))

    tensor = open_safetensors(path).tensor("w")

    assert tensor.tolist() == [[1, 2], [3, 4]]
    assert tensor.data_ptr() % 4 == 0


@pytest.mark.parametrize(
    "header",
    [
        '{ "w" : {"shape" : [ 2 , 2 ] , "data_offsets":[0,16],\n"dtype":"F32" } , "__metadata__" : { } }   ',
        '{"__metadata__":{"k":"\\u00e9\\n\\"{}"},' + a.entry() + "}",
        "{" + a.entry(name="\\u0077") + "}",
        "{" + a.entry() + "," + a.entry("empty", shape="[0]", offsets="[16,16]") + "}",
    ],
)
def test_any_valid_json_header_is_read(tmp_path: Path, header: str):
    path = tmp_path / "m.safetensors"
    path.write_bytes(a.safetensors(header, a.FLOATS))
    expected = safetensors.torch.load(path.read_bytes())

    file = open_safetensors(path)

    assert same({name: file.tensor(name) for name in file}, expected)


def test_a_file_with_only_metadata_is_read(tmp_path: Path):
    (tmp_path / "m.safetensors").write_bytes(a.safetensors('{"__metadata__":{"a":"b"}}'))

    file = open_model(tmp_path / "m.safetensors")

    assert (len(file), file.metadata) == (0, {"a": "b"})


def test_opening_seven_gigabytes_reads_only_the_header(tmp_path: Path):
    manifest = json.loads(gzip.decompress((KEYS / "sdxl_base.json.gz").read_bytes()))
    header, end = {}, 0
    for name, (shape, dtype) in manifest.items():
        begin, end = end, end + TensorInfo(tuple(shape), dtype).nbytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    path = tmp_path / "xl.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        stream.truncate(8 + len(raw) + end)  # a sparse file: no disk space is used
    code = (
        "import sys, time\nfrom gouache.files.open import open_model\n"
        "start = time.process_time()\nfile = open_model(sys.argv[1])\n"
        "print(time.process_time() - start, len(file), file.nbytes, 'torch' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    seconds, count, size, torch_is_in = done.stdout.split()

    assert (int(count), int(size), torch_is_in) == (2515, end, "False")
    assert end > 6.9e9
    assert float(seconds) < 0.2  # about 0.015 on an idle machine


@pytest.mark.parametrize("padding", [b" ", b"\n", b"\t", b"\r\n", b" \n\t "])
def test_a_header_padded_with_any_whitespace_is_read_as_by_the_official_reader(tmp_path: Path, padding: bytes):
    tensors = {"a": torch.arange(6.0).reshape(2, 3)}
    content = safetensors.torch.save(tensors)
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip() + padding * 9
    path = tmp_path / "padded.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])

    assert torch.equal(safetensors.torch.load_file(path)["a"], tensors["a"])  # the official reader
    assert torch.equal(open_model(path).read("a"), tensors["a"])

"""Valid files with bytes changed, removed, repeated or inserted: a one-line error, or tensors that can be read."""

from __future__ import annotations

import collections
import io
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gouache.errors import FileError
from gouache.files.open import open_model

from . import assemble as a


def saved(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


VALUE = {
    "state_dict": collections.OrderedDict(a=torch.arange(6.0).view(2, 3).t(), b=nn.Parameter(torch.ones(2).half())),
    "epoch": 3,
    "callbacks": {"scores": [0.5, None, {1: (2, "x")}], "tags": {"a", "b"}},
}
VALID = {
    "zip": saved(VALUE),
    "zip protocol 5": saved(VALUE, pickle_protocol=5),
    "legacy": saved(VALUE, _use_new_zipfile_serialization=False),
    "tar": a.torch_tar(),
    "safetensors": safetensors.torch.save({"a": torch.arange(3.0), "b": torch.ones(2, 2).half()}, {"k": "v"}),
}


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    content = bytearray(VALID[draw(st.sampled_from(sorted(VALID)))])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content) - 1))
        match draw(st.sampled_from(["change", "number", "cut", "repeat", "shorten", "insert"])):
            case "change":
                content[at] = draw(st.integers(0, 255))
            case "number":
                content[at : at + 4] = draw(st.sampled_from([b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f", b"\1\0\0\0"]))
            case "cut":
                del content[at : at + draw(st.integers(1, 40))]
            case "repeat":
                content[at:at] = content[at : at + draw(st.integers(1, 40))]
            case "shorten":
                del content[at:]
            case "insert":
                content[at:at] = draw(st.binary(max_size=8))
        if not content:
            break
    return bytes(content)


@settings(deadline=None, max_examples=1500)
@given(mutated())
def test_a_mutated_file_is_read_or_refused_with_a_one_line_error(content: bytes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.ckpt"
        path.write_bytes(content)
        try:
            file = open_model(path)
        except FileError as error:
            assert "\n" not in str(error)
            return

        for name, info in file.tensors.items():
            tensor = file.tensor(name)
            assert tuple(tensor.shape) == info.shape
            # A tensor with stride 0 may be larger than the file, up to the limit of the reader.
            assert tensor.contiguous().nbytes == info.nbytes <= 4 * len(content) + 1_000_000


@settings(deadline=None, max_examples=500)
@given(st.lists(st.sampled_from([
    a.number(3), a.text("a"), b"N", b")", b"]", b"}", b"(", b"t", b"u", b"e", b"R", b"b", b"\x81", b"a", b"s", b"0",
    b"2", b"1", b"Q", b"\x85", b"\x86", b"q\x01", b"h\x01", b"d", b"l", b"o", b"\x8f", b"\x90", b"\x91", b"\x92",
    a.name("collections", "OrderedDict"), a.name("torch._utils", "_rebuild_tensor_v2"), a.name("builtins", "set"),
    a.name("torch._utils", "_rebuild_parameter"), a.name("_codecs", "encode"), a.name("builtins", "bytearray"),
    a.name("numpy", "dtype"), a.name("numpy.core.multiarray", "scalar"), a.name("torch", "Size"),
    a.name("numpy.core.multiarray", "_reconstruct"), a.name("torch._tensor", "_rebuild_from_type_v2"),
    a.name("collections", "Counter"), a.name("pathlib", "PosixPath"), a.name("torch", "device"),
    a.name("omegaconf.dictconfig", "DictConfig"), a.name("torch.nn.modules.container", "ParameterDict"),
    a.tensor(a.storage()), a.storage(),
]), max_size=25))  # fmt: skip
def test_any_pickle_of_known_parts_is_read_or_refused_with_a_one_line_error(parts: list[bytes]):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.ckpt"
        path.write_bytes(a.torch_zip(a.program(*parts, protocol=4)))
        try:
            file = open_model(path)
        except FileError as error:
            assert "\n" not in str(error)
            return

        assert all(tuple(file.tensor(name).shape) == info.shape for name, info in file.tensors.items())

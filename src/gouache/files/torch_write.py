"""Writes files in torch.save's format, tensor by tensor, for programs that can only read `.ckpt`.

The file is a zip archive of uncompressed entries, as torch.save makes it:

    archive/data.pkl     the names and values, in opcodes of pickle protocol 2
    archive/byteorder    "little"
    archive/data/0 ...   the bytes of each tensor, at a multiple of 64 bytes, so that the file can be memory-mapped
    archive/version      "3"

The pickle is written opcode by opcode and contains only tensors and plain values, so any reader that restricts what
a pickle may call (such as torch's with weights_only) can open it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gouache.errors import ModelError, printable
from gouache.files.record import TensorInfo
from gouache.files.source import TORCH_NAMES
from gouache.files.stored import STORAGE_TYPES
from gouache.files.write import AtomicOutput, Check, OnBytes, atomic_output, bytes_of

if TYPE_CHECKING:
    import torch

_ROOT = "archive/"
_ALIGNED = 64
_ALL_ONES = 0xFFFFFFFF
_MOST_IN_ONE = _ALL_ONES - 1  # bytes; larger entries need zip64. The largest tensors have a tenth of it
# dtype -> torch's typed storage class. A dtype without one is stored as untyped bytes with the dtype as an argument.
_TYPED = {dtype: name.name for name, dtype in STORAGE_TYPES.items() if name.module == "torch"}


def stream_torch(
    path: str | Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
    values: Mapping[str, Any] | None = None,
    *,
    on_bytes: OnBytes | None = None,
    check: Check | None = None,
    new: bool = False,
) -> str:
    """Writes {"state_dict": tensors, **values} in torch.save's format, one tensor at a time; returns the SHA-256.

    `values` are None, numbers, text, and lists and dictionaries of them; `on_bytes`, `check` and `new` are the same as
    in `write.stream_safetensors`. Raises ModelError for other values, and if `read` returns a tensor whose shape or
    dtype differs from `infos`.
    """
    names = list(infos)
    pickle = _pickled(infos, names, values or {})
    total = sum(info.nbytes + 256 for info in infos.values()) + len(pickle)
    with atomic_output(path, total, check, new=new) as output:
        archive = _Archive(output)
        archive.add("data.pkl", pickle)
        archive.add("byteorder", b"little")
        for number, name in enumerate(names):
            content = bytes_of(name, read(name), infos[name])
            archive.add(f"data/{number}", content)
            if on_bytes is not None:
                on_bytes(len(content))
        archive.add("version", b"3\n")
        archive.close()
    return output.digest.hexdigest()


class _Archive:
    """A zip archive of uncompressed entries, written front to back."""

    def __init__(self, output: AtomicOutput) -> None:
        self._output = output
        self._at = 0
        self._directory: list[bytes] = []

    def add(self, name: str, content: bytes | memoryview) -> None:
        size = len(content)
        if size > _MOST_IN_ONE:
            raise ModelError(
                f"{name} has {size:,} bytes, more than one entry of a .ckpt can hold; write .safetensors instead"
            )
        raw = (_ROOT + name).encode()
        start, crc = self._at, zlib.crc32(content)
        # An extra field with an unused id pads the header, so that the content begins at a multiple of 64.
        unpadded = start + 30 + len(raw) + 4
        padding = struct.pack("<2H", 0x4246, -unpadded % _ALIGNED) + b"Z" * (-unpadded % _ALIGNED)
        fields = (20, 1 << 11, 0, 0, 33, crc, size, size, len(raw))  # version, flags, stored, midnight, 1980-01-01, ...
        self._write(struct.pack("<4s5H3I2H", b"PK\x03\x04", *fields, len(padding)) + raw + padding)
        self._write(content)
        # Beyond four gigabytes, the position of the entry is stored in a zip64 extra field.
        zip64 = struct.pack("<2HQ", 1, 8, start) if start >= _ALL_ONES else b""
        rest = (len(zip64), 0, 0, 0, 0, min(start, _ALL_ONES))
        self._directory.append(struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 45, *fields, *rest) + raw + zip64)

    def close(self) -> None:
        start, directory, count = self._at, b"".join(self._directory), len(self._directory)
        self._write(directory)
        where = self._at
        fields = (44, 45, 45, 0, 0, count, count, len(directory), start)
        self._write(struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", *fields))
        self._write(struct.pack("<4sIQI", b"PK\x06\x07", 0, where, 1))
        short = (min(count, 0xFFFF), min(count, 0xFFFF), len(directory), min(start, _ALL_ONES))
        self._write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, *short, 0))

    def _write(self, data: bytes | memoryview) -> None:
        self._at += len(data)
        self._output.write(data)


def _pickled(infos: Mapping[str, TensorInfo], names: Sequence[str], values: Mapping[str, Any]) -> bytes:
    if "state_dict" in values:
        raise ModelError("a value cannot be named 'state_dict': this is the name of the dictionary of tensors")
    tensors = b"".join(_text(name) + _tensor(number, infos[name]) for number, name in enumerate(names))
    rest = b"".join(_text(name) + _plain(value, name) for name, value in values.items())
    return b"\x80\x02}(" + _text("state_dict") + b"}(" + tensors + b"u" + rest + b"u."


def _tensor(number: int, info: TensorInfo) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, offset 0, size, stride, requires_grad, hooks), or v3 with a dtype."""
    typed = _TYPED.get(info.dtype)
    kind = _name("torch", typed) if typed else _name("torch.storage", "UntypedStorage")
    count = info.elements if typed else info.nbytes
    storage = b"(" + _text("storage") + kind + _text(str(number)) + _text("cpu") + _int(count) + b"tQ"
    strides = [1]
    for side in reversed(info.shape[1:]):
        strides.append(strides[-1] * side)
    size = b"(" + b"".join(map(_int, info.shape)) + b"t"
    stride = b"(" + b"".join(map(_int, reversed(strides[: len(info.shape)]))) + b"t"
    hooks = _name("collections", "OrderedDict") + b")R"
    args = storage + _int(0) + size + stride + b"\x89" + hooks
    if typed:
        return _name("torch._utils", "_rebuild_tensor_v2") + b"(" + args + b"tR"
    return _name("torch._utils", "_rebuild_tensor_v3") + b"(" + args + _name("torch", TORCH_NAMES[info.dtype]) + b"tR"


def _plain(value: Any, where: str) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return _int(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | tuple):
        return b"](" + b"".join(_plain(item, where) for item in value) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_plain(key, where) + _plain(item, where) for key, item in value.items()) + b"u"
    raise ModelError(f"{printable(where)} is a {type(value).__name__}, which cannot be written into a .ckpt")


def _int(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    length = (value.bit_length() + 8) // 8
    if length > 255:
        raise ModelError("a number of more than 2,000 bits cannot be written into a .ckpt")
    return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()

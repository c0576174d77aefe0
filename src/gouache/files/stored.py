"""Positions of tensors in a pickled file: storages, and views of them by offset, size and stride.

All arithmetic on a pickle's tensors is here, on untrusted numbers: a view is accepted only if every element that it
can reach is inside the bytes that the file has for its storage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from gouache.errors import DamagedFile, FileError, UnsafeFile
from gouache.files.pickle_machine import Global, type_label
from gouache.files.record import ITEM_SIZE, TensorInfo
from gouache.files.source import TORCH_NAMES

MAX_DIMENSIONS = 16
# A view may repeat elements (stride 0). It is refused if it has more bytes than MAX_GROWTH * stored + FREE_GROWTH.
MAX_GROWTH, FREE_GROWTH = 4, 1_000_000

_TYPED = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip

# The class that a persistent id names -> dtype; the size of an untyped storage is in bytes.
STORAGE_TYPES = {Global(module, name): dtype for module in ("torch", "torch.cuda") for name, dtype in _TYPED.items()}
STORAGE_TYPES |= {Global("torch.storage", name): "U8" for name in ("UntypedStorage", "_UntypedStorage")}

DTYPES = {Global("torch", torch_name): dtype for dtype, torch_name in TORCH_NAMES.items()}
DTYPES |= {Global("torch", old): DTYPES[Global("torch", new)] for old, new in
           [("double", "float64"), ("float", "float32"), ("half", "float16"), ("long", "int64"), ("int", "int32"),
            ("short", "int16"), ("cfloat", "complex64")]}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Storage:
    """`nbytes` bytes of elements of `dtype`: at byte `offset` of the file, or of `inline` if they are in the pickle."""

    dtype: str
    offset: int
    nbytes: int
    swap: bool = False  # written by a machine with the other endianness
    inline: bytes | None = None


@dataclass(frozen=True, slots=True)
class StorageId:
    """What a persistent id states about a storage: its key, dtype and element count, and a window (offset, count)."""

    key: Any
    dtype: str
    count: int
    window: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        return self.count * ITEM_SIZE[self.dtype]

    def at(self, offset: int, swap: bool = False) -> Storage:
        """The storage, or its window if there is one, given that it begins at byte `offset` of the file."""
        first, count = self.window or (0, self.count)
        item = ITEM_SIZE[self.dtype]
        return Storage(self.dtype, offset + first * item, count * item, swap)


def storage_id(path: Path, persistent_id: Any) -> StorageId:
    """Reads ('storage', class, key, location, count[, window]), the persistent id that torch.save gives a storage.

    The location ('cuda:3', 'cpu') is the device that the tensor was on; here every tensor is read into main memory.
    """
    if not isinstance(persistent_id, tuple) or len(persistent_id) not in (5, 6) or persistent_id[0] != "storage":
        raise DamagedFile(path, "its pickle refers to something that is not a tensor storage")
    kind, key, _, count = persistent_id[1:5]
    dtype = STORAGE_TYPES.get(kind) if isinstance(kind, Global) else None
    if dtype is None:
        raise FileError(path, f"holds a storage of the unsupported type {type_label(kind)}")
    if not isinstance(key, str) or not _sizes((count,)):
        raise DamagedFile(path, "its pickle refers to a tensor storage with an invalid key or size")
    window = persistent_id[5] if len(persistent_id) == 6 else None
    if window is None:
        return StorageId(key, dtype, count)
    if not isinstance(window, tuple) or len(window) != 3 or not _sizes(window[1:]) or sum(window[1:]) > count:
        raise DamagedFile(path, "its pickle describes a part of a storage that reaches outside it")
    return StorageId(key, dtype, count, (window[1], window[2]))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that was checked to be inside its storage. `stride` is None if it is contiguous."""

    info: TensorInfo
    offset: int  # of the first element, in bytes, in the file or in `inline`
    stride: tuple[int, ...] | None
    swap: bool = False
    inline: bytes | None = None


def view(path: Path, storage: Storage, dtype: str, offset: Any, shape: Any, stride: Any) -> StoredTensor:
    """The tensor of `shape` and `stride` (in elements) that starts `offset` elements into `storage`.

    Raises DamagedFile if it reaches outside the storage, UnsafeFile if it is far larger than the stored bytes.
    """
    if not (_sizes(shape) and _sizes(stride) and len(shape) == len(stride) and _sizes((offset,))):
        raise DamagedFile(path, "holds a tensor whose shape, stride or offset does not consist of whole numbers")
    if len(shape) > MAX_DIMENSIONS:
        raise UnsafeFile(path, f"holds a tensor of {len(shape)} dimensions; at most {MAX_DIMENSIONS} are allowed")
    item, info = ITEM_SIZE[dtype], TensorInfo(tuple(shape), dtype)
    start = storage.offset + offset * item
    if info.elements == 0:
        return StoredTensor(info, storage.offset, None)

    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride))
    if (offset + span) * item > storage.nbytes:
        raise DamagedFile(
            path,
            f"holds a tensor of shape {list(shape)} that needs {(offset + span) * item} bytes of a storage of "
            f"{storage.nbytes} bytes",
        )
    if info.nbytes > MAX_GROWTH * storage.nbytes + FREE_GROWTH:
        raise UnsafeFile(
            path,
            f"holds a tensor of shape {list(shape)} that would expand {storage.nbytes} stored bytes to {info.nbytes}",
        )
    packed = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    contiguous = all(n == 1 or s == p for n, s, p in zip(shape, stride, packed))
    return StoredTensor(info, start, None if contiguous else tuple(stride), storage.swap, storage.inline)


def _sizes(values: Any) -> TypeGuard[tuple[int, ...]]:
    return isinstance(values, tuple | list) and all(type(n) is int and 0 <= n < 2**63 for n in values)

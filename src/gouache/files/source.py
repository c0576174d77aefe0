"""Source: a file that is opened once; all its bytes are read through this one descriptor.

A path can name different files at different times, so it is used only once: it is opened and checked to be a regular
file (links are followed; the Hugging Face cache consists of them), and afterwards only the descriptor is used.
Headers are read through a shared read-only memory map, which takes no private memory. Tensors are read through a
second, private map, made on the first tensor access, so that changing a tensor in place never changes the file.
"""

from __future__ import annotations

import mmap
import os
import stat
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from gouache.errors import DamagedFile, DeviceError, FileError, NotAModel
from gouache.files.record import ITEM_SIZE, TensorInfo

if TYPE_CHECKING:
    import torch

# Linux's MAP_NORESERVE: no memory is reserved for private copies of the map's pages. Without it a 7 GB file cannot be
# mapped writable on a machine with 4 GB, although no page is ever written. Python has the name since 3.13.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0

TORCH_NAMES = {
    "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64",
    "F32": "float32", "U32": "uint32", "I32": "int32",
    "BF16": "bfloat16", "F16": "float16", "U16": "uint16", "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class Source:
    """A regular file, opened for reading. `data` is its content as a read-only map that can be sliced like `bytes`."""

    def __init__(self, path: str | Path) -> None:
        """Raises FileError if the file does not exist or cannot be read, NotAModel if it is not a regular file."""
        self.path = Path(path)
        self._descriptor = _open(self.path)
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            raise NotAModel(self.path, f"is {kind}, not a regular file")
        self.size = status.st_size
        self.data: mmap.mmap | bytes = b""
        if self.size:
            try:
                self.data = mmap.mmap(self._descriptor, self.size, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise FileError(self.path, f"cannot be read: {error}") from None
        self._private: mmap.mmap | None = None

    def tensor(
        self, offset: int, info: TensorInfo, stride: tuple[int, ...] | None = None, swap: bool = False
    ) -> torch.Tensor:
        """The tensor that starts at byte `offset`, as a view of the private map; see `tensor_from`."""
        if self._private is None and self.size:
            try:
                self._private = _private_map(self._descriptor, self.size)
            except (OSError, ValueError) as error:
                raise FileError(self.path, f"cannot be mapped into memory: {error}") from None
        return tensor_from(self._private, offset, info, stride, swap)


def _private_map(descriptor: int, size: int) -> mmap.mmap:
    if not _NO_RESERVE:
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    return mmap.mmap(descriptor, size, mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE)


def tensor_from(
    buffer: mmap.mmap | bytearray | None,
    offset: int,
    info: TensorInfo,
    stride: tuple[int, ...] | None = None,
    swap: bool = False,
) -> torch.Tensor:
    """A tensor of `buffer` that begins at byte `offset`, contiguous if `stride` (in elements) is None.

    It is a view and keeps the buffer alive; only data of the other endianness (`swap`) and data that is not aligned
    to the element size is copied. The caller has checked that the tensor is inside the buffer.
    """
    import torch  # here, so that listing a file needs no torch

    dtype: torch.dtype | None = getattr(torch, TORCH_NAMES[info.dtype], None)
    if dtype is None:
        raise DeviceError(f"torch {torch.__version__} does not support {info.dtype} tensors: install a newer one")
    if info.elements == 0:
        return torch.empty(info.shape, dtype=dtype)
    assert buffer is not None
    item = ITEM_SIZE[info.dtype]
    span = info.elements if stride is None else 1 + sum((n - 1) * s for n, s in zip(info.shape, stride))
    raw = torch.frombuffer(buffer, dtype=torch.uint8, count=span * item, offset=offset)
    if swap:
        part = item // 2 if info.dtype == "C64" else item  # a complex number is two floats, each swapped
        raw = raw.view(-1, part).flip(1).reshape(-1)
    elif offset % item:
        raw = raw.clone()
    flat = raw.view(dtype)
    return flat.view(info.shape) if stride is None else flat.as_strided(info.shape, stride)


def size_text(size: int) -> str:
    """4265146304 -> '4265 MB': decimal megabytes, as download pages show them."""
    return f"{size / 1e6:.0f} MB" if size >= 1_000_000 else f"{size} bytes"


def truncated_error(path: Path, size: int, expected: int) -> DamagedFile:
    """The error for a file that ends too early: it has `size` of `expected` bytes."""
    in_megabytes = f"{size / 1e6:.0f} of {expected / 1e6:.0f} MB"
    amount = in_megabytes if size >= 1_000_000 else f"{size} of {size_text(expected)}"
    return DamagedFile(path, f"ends after {amount}: the download is incomplete, fetch it again")


def _open(path: Path) -> int:
    # O_NONBLOCK: opening a named pipe without a writer returns at once (and is then refused) instead of waiting.
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"):
        flags |= getattr(os, name, 0)
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        raise FileError(path, "there is no such file") from None
    except PermissionError:
        raise FileError(path, "cannot be read: permission denied") from None
    except (OSError, ValueError) as error:
        raise FileError(path, f"cannot be opened: {getattr(error, 'strerror', None) or error}") from None


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

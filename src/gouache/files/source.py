"""Source: a file that is opened once; all its bytes are read through this one descriptor.

A path can name different files at different times, so it is used only once: it is opened and checked to be a regular
file (links are followed; the Hugging Face cache consists of them), and afterwards only the descriptor is used.

A file can become shorter while it is read, and a process that touches a page of a memory map beyond the end is killed
(SIGBUS). So bytes and whole tensors are read by calls, which then report an error: headers, hashes, and everything that
is written to another file. Only a model that is loaded keeps its weights mapped, so that it takes no memory twice: its
file's size is checked before each tensor is mapped. The map is private: changing a tensor never changes the file.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from gouache.errors import DamagedFile, DeviceError, FileError, NotAModel, printable
from gouache.files.record import ITEM_SIZE, TensorInfo
from gouache.outside import open_outside

if TYPE_CHECKING:
    import torch

# Linux's MAP_NORESERVE: no memory is reserved for private copies of the map's pages. Without it a 7 GB file cannot be
# mapped writable on a machine with 4 GB, although no page is ever written. Python has the name since 3.13.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
_AT_ONCE = 1 << 30  # bytes of one call; Linux reads at most 2 GB

TORCH_NAMES = {
    "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64",
    "F32": "float32", "U32": "uint32", "I32": "int32",
    "BF16": "bfloat16", "F16": "float16", "U16": "uint16", "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class Source:
    """A regular file, opened for reading. `data` is its content, which can be sliced like `bytes`.

    `mapped` is the same as a memory map, for parsers that go through a header byte by byte.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises FileError if the file does not exist or cannot be read, NotAModel if it is not a regular file."""
        self.path = Path(path)
        self._file = _open(self.path)
        weakref.finalize(self, self._file.close)
        self.size = os.fstat(self._file.fileno()).st_size
        self.mapped: mmap.mmap | bytes = b""
        if self.size:
            try:
                self.mapped = mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise FileError(self.path, f"cannot be read: {error}") from None
        self._private: mmap.mmap | None = None

    @property
    def data(self) -> FileBytes:
        """The content, read when it is sliced."""
        return FileBytes(self)

    def fill(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes of the file from `offset`. Raises FileError if the file ends before."""
        done = 0
        while done < len(buffer):
            piece = buffer[done : done + _AT_ONCE]
            try:
                count = _read_at(self._file.fileno(), piece, offset + done)
            except OSError as error:
                raise FileError(self.path, f"cannot be read: {error.strerror}") from None
            if not count:
                raise self._shortened()
            done += count

    def read_tensor(
        self, offset: int, info: TensorInfo, stride: tuple[int, ...] | None = None, swap: bool = False
    ) -> torch.Tensor:
        """The tensor that starts at byte `offset`, read into memory of its own. Raises FileError."""
        import torch

        raw = torch.empty(_span(info, stride) * ITEM_SIZE[info.dtype], dtype=torch.uint8)
        if info.elements:
            self.fill(memoryview(raw.numpy()), offset)  # pyright: ignore[reportArgumentType]
        return _typed(raw, info, stride, swap)

    def map_tensor(
        self, offset: int, info: TensorInfo, stride: tuple[int, ...] | None = None, swap: bool = False
    ) -> torch.Tensor:
        """The tensor that starts at byte `offset`, as a view of the private map; see `tensor_from`."""
        if os.fstat(self._file.fileno()).st_size < self.size:
            raise self._shortened()
        if self._private is None and self.size:
            try:
                self._private = _private_map(self._file.fileno(), self.size)
            except (OSError, ValueError) as error:
                raise FileError(self.path, f"cannot be mapped into memory: {error}") from None
        return tensor_from(self._private, offset, info, stride, swap)

    def _shortened(self) -> FileError:
        now = os.fstat(self._file.fileno()).st_size
        return FileError(
            self.path,
            f"was changed while it was read: it had {self.size:,} bytes, and now ends after {now:,}; try again when "
            "nothing writes to it",
        )


class FileBytes:
    """The content of a source, read when it is sliced."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return self._source.size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._source.size)
        buffer = bytearray(max(0, stop - start))
        if buffer:
            self._source.fill(memoryview(buffer), start)
        return bytes(buffer)


def _read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    data = (
        os.pread(descriptor, len(buffer), offset)
        if hasattr(os, "pread")
        else _seek_and_read(descriptor, buffer, offset)
    )
    buffer[: len(data)] = data
    return len(data)


def _seek_and_read(descriptor: int, buffer: memoryview, offset: int) -> bytes:
    """On Windows, which has no reading at an offset; the position of the descriptor is used for nothing else."""
    with _ONE_AT_A_TIME:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, len(buffer))


_ONE_AT_A_TIME = threading.Lock()


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

    if info.elements == 0:
        return torch.empty(info.shape, dtype=_torch_dtype(info))
    assert buffer is not None
    item = ITEM_SIZE[info.dtype]
    raw = torch.frombuffer(buffer, dtype=torch.uint8, count=_span(info, stride) * item, offset=offset)
    return _typed(raw.clone() if offset % item and not swap else raw, info, stride, swap)


def _span(info: TensorInfo, stride: tuple[int, ...] | None) -> int:
    """The elements from the first of a tensor to its last."""
    if stride is None or not info.elements:
        return info.elements
    return 1 + sum((n - 1) * s for n, s in zip(info.shape, stride))


def _torch_dtype(info: TensorInfo) -> torch.dtype:
    import torch

    dtype: torch.dtype | None = getattr(torch, TORCH_NAMES[info.dtype], None)
    if dtype is None:
        raise DeviceError(f"torch {torch.__version__} does not support {info.dtype} tensors: install a newer one")
    return dtype


def _typed(raw: torch.Tensor, info: TensorInfo, stride: tuple[int, ...] | None, swap: bool) -> torch.Tensor:
    """The tensor whose bytes are `raw`."""
    dtype = _torch_dtype(info)
    if swap:
        item = ITEM_SIZE[info.dtype]
        part = item // 2 if info.dtype == "C64" else item  # a complex number is two floats, each swapped
        raw = raw.view(-1, part).flip(1).reshape(-1)
    flat = raw.view(dtype)
    return flat.view(info.shape) if stride is None else flat.as_strided(info.shape, stride)


def size_text(size: int) -> str:
    """4265146304 -> '4265 MB': decimal megabytes, as download pages show them."""
    return f"{size / 1e6:.0f} MB" if size >= 1_000_000 else f"{size} bytes"


def truncated_error(path: Path, size: int, expected: int) -> DamagedFile:
    """The error for a file that ends too early: it has `size` of `expected` bytes."""
    in_megabytes = f"{size / 1e6:.0f} of {expected / 1e6:.0f} MB"
    if in_megabytes == f"{expected / 1e6:.0f} of {expected / 1e6:.0f} MB":
        in_megabytes = f"{size:,} of {expected:,} bytes"
    amount = in_megabytes if size >= 1_000_000 else f"{size} of {size_text(expected)}"
    return DamagedFile(path, f"ends after {amount}: the download is incomplete, fetch it again")


def _open(path: Path) -> BinaryIO:
    try:
        return open_outside(path)
    except FileError as error:
        if str(error).endswith("not a regular file") or str(error).endswith("expected a file"):
            raise NotAModel(path, str(error).removeprefix(f"{printable(str(path))}: ")) from None
        raise

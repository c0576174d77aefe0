"""Files written whole or not at all, and safetensors written tensor by tensor.

Everything goes to a temporary file in the same folder first: written, flushed to the disk, read back and compared,
and only then put in the place of the old one. Whatever stops that half-way (an error, Ctrl-C, a full disk, kill -9,
a power cut) leaves the old file as it was; and a file that is mapped somewhere is never written to.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from gouache.errors import DamagedFile, FileError, ModelError, printable
from gouache.files.record import ITEM_SIZE, TensorInfo
from gouache.files.source import TORCH_NAMES, size_text

if TYPE_CHECKING:
    import torch

_DTYPE_NAMES = {f"torch.{torch_name}": dtype for dtype, torch_name in TORCH_NAMES.items()}
_SPARE = 16_000_000  # bytes to leave free on the disk
_OWNER = re.sub(r"[^A-Za-z0-9]", "", platform.node())[:32]

OnBytes = Callable[[int], None]
"""Told of progress: how many more bytes of tensors are written."""

Check = Callable[[Path], None]
"""Looks at a finished file, at a path where it can be read, before it appears; raises to refuse it."""


class AtomicOutput:
    """A file being written that has no name yet; `write` hashes what it passes on."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        return self._file.write(data)


@contextmanager
def atomic_output(path: str | Path, size: int = 0, check: Check | None = None) -> Iterator[AtomicOutput]:
    """With it, write a file that appears at `path` complete when the block ends, or, if it raises, never.

    `size`, where known, is the bytes to come: too small a disk is refused before anything is written. `check` reads
    the finished file before it appears, in place of comparing hashes, and refuses it by raising. A file that is
    replaced hands on its permissions; a symbolic link is replaced, not followed. Raises FileError.
    """
    path = Path(path)
    temporary = draft_name(path.parent, ".tmp")
    try:
        _check_target(path, size)
        with _draft(temporary) as file:
            output = AtomicOutput(file)
            yield output
            file.flush()
            with suppress(FileNotFoundError):
                mode = stat.S_IMODE(path.stat().st_mode)
                os.chmod(file.fileno() if os.chmod in os.supports_fd else temporary, mode)  # noqa: PTH101
            os.fsync(file.fileno())
            file.seek(0)
            if check is not None:
                check(_where(file, temporary))
            elif hashlib.file_digest(file, "sha256").digest() != output.digest.digest():
                raise DamagedFile(path, "did not read back as it was written: the disk or its driver is at fault")
            named = _name(file, temporary, path)
        if named != path:
            os.replace(named, path)
        sync_folder(path.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise FileError(path, f"cannot be written: {reason}; what was there before is untouched") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def draft_name(folder: Path, ending: str) -> Path:
    """A name in `folder` for what is not whole yet, that says who is at work on it."""
    return folder / f".gouache-{_OWNER}-{secrets.token_hex(4)}-{os.getpid()}{ending}"


def remove_litter(folder: Path, ending: str) -> None:
    """Remove what killed processes of this machine left in `folder` under draft names."""
    for litter in folder.glob(f".gouache-{_OWNER}-*{ending}"):
        process = litter.stem.rpartition("-")[2]
        if not process.isdecimal() or _runs(int(process)):
            continue
        if litter.is_dir():
            shutil.rmtree(litter, ignore_errors=True)
        else:
            with suppress(OSError):
                litter.unlink()


def _runs(process: int) -> bool:
    if os.name != "posix":  # elsewhere a signal 0 would be no question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _draft(temporary: Path) -> BufferedRandom:
    """A new file beside `temporary` that has no name, where the system has such, so that a kill leaves nothing."""
    if hasattr(os, "O_TMPFILE"):
        with suppress(OSError):  # not on every file system
            descriptor = os.open(temporary.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
            if Path(f"/proc/self/fd/{descriptor}").exists():
                return open(descriptor, "r+b")  # noqa: PTH123 - closed by who asked for it
            os.close(descriptor)
    remove_litter(temporary.parent, temporary.suffix)
    return temporary.open("x+b")


def _where(file: BinaryIO, temporary: Path) -> Path:
    return temporary if temporary.exists() else Path(f"/proc/self/fd/{file.fileno()}")


def _name(file: BinaryIO, temporary: Path, path: Path) -> Path:
    """Give a draft that has no name yet that of `path`, or, where this is taken, `temporary`; returns which it has."""
    if temporary.exists():
        return temporary
    # With a folder named, Python follows the link that stands in /proc; without, it would link to the link.
    folder = os.open(temporary.parent, os.O_RDONLY)
    try:
        with suppress(FileExistsError):
            os.link(f"/proc/self/fd/{file.fileno()}", path, src_dir_fd=folder)
            return path
        remove_litter(temporary.parent, temporary.suffix)
        os.link(f"/proc/self/fd/{file.fileno()}", temporary, src_dir_fd=folder)
        return temporary
    finally:
        os.close(folder)


def write_atomic(path: str | Path, data: bytes) -> None:
    """`data` as the file `path`, whole or not at all."""
    with atomic_output(path, len(data)) as output:
        output.write(data)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """`tensors` as a safetensors file; returns its SHA-256 in hexadecimal."""
    infos = {name: describe(tensor) for name, tensor in tensors.items()}
    return stream_safetensors(path, infos, tensors.__getitem__, metadata)


def stream_safetensors(
    path: str | Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    on_bytes: OnBytes | None = None,
    check: Check | None = None,
) -> str:
    """A safetensors file of tensors that `read` hands over one at a time; only one is in memory. Returns its SHA-256.

    The order is the library's: by dtype, widest first, so that every tensor is aligned, then by name. `infos` and
    `read` of a ModelFile fit. `on_bytes` is told of each tensor that is written, `check` sees the file before it
    appears. Raises ModelError if `read` gives another shape or dtype than was announced.
    """
    order = sorted(infos, key=lambda name: (_RANK[infos[name].dtype], name))
    header = _header(path, order, infos, metadata or {})
    total = len(header) + sum(info.nbytes for info in infos.values())
    with atomic_output(path, total, check) as output:
        output.write(header)
        for name in order:
            output.write(bytes_of(name, read(name), infos[name]))
            if on_bytes is not None:
                on_bytes(infos[name].nbytes)
    return output.digest.hexdigest()


def describe(tensor: torch.Tensor) -> TensorInfo:
    """Shape and dtype of a tensor in the words of this package. Raises ModelError for a dtype no file can hold."""
    dtype = _DTYPE_NAMES.get(str(tensor.dtype))
    if dtype is None:
        raise ModelError(f"a tensor of dtype {tensor.dtype} cannot be stored in a safetensors file")
    return TensorInfo(tuple(tensor.shape), dtype)


_RANK = {dtype: rank for rank, dtype in enumerate(ITEM_SIZE)}


def _header(path: str | Path, order: list[str], infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise ModelError(f"metadata {printable(str(key), 60)!r} is no text; safetensors metadata is text only")
    if "__metadata__" in infos:
        raise ModelError("a tensor cannot be called '__metadata__': safetensors keeps that name for itself")
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        info = infos[name]
        begin, end = end, end + info.nbytes
        fields[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, end]}
    try:
        text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise FileError(path, "cannot be written: a name or metadata text in it is not valid Unicode") from None
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(name: str, tensor: torch.Tensor, info: TensorInfo) -> memoryview | bytes:
    """The bytes of `tensor`, which `name` and `info` announced: row by row, little-endian, without a copy if it can."""
    import torch

    found = describe(tensor)
    if found != info:
        raise ModelError(
            f"tensor {printable(name)!r} was to be {info.dtype} {list(info.shape)}, and is "
            f"{found.dtype} {list(found.shape)}"
        )
    if info.nbytes == 0:
        return b""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _check_target(path: Path, size: int) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise FileError(path, "cannot be written: its folder does not exist")
    if path.exists() and not path.is_file():
        raise FileError(path, "cannot be written: it is a folder or a device, not a file")
    free = shutil.disk_usage(folder).free
    if size and size + _SPARE > free:
        raise FileError(path, f"cannot be written: it takes {size_text(size)}, and {size_text(free)} are free there")


def sync_folder(folder: Path) -> None:
    """Bring to the disk which names stand in `folder`."""
    if os.name != "posix":  # elsewhere a folder cannot be opened, and renaming is made durable by the system
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

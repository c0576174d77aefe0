"""Writes files atomically, and safetensors files tensor by tensor.

Data goes to a temporary file in the same folder first, which is written, flushed to the disk, read back and compared,
and only then renamed over the old file. Any interruption (an error, Ctrl-C, a full disk, kill -9, a power cut) leaves
the old file unchanged. A file that some process has mapped is never written to.
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
_SPARE = 16_000_000  # bytes that stay free on the disk; small files, such as pictures, may use half of what is left
_OWNER = re.sub(r"[^A-Za-z0-9]", "", platform.node())[:32]

OnBytes = Callable[[int], None]
"""Progress callback: receives the number of tensor bytes written since the last call."""

Check = Callable[[Path], None]
"""Checks a finished file, at a path where it can be read, before it gets its final name; raises to refuse it."""


class AtomicOutput:
    """A file being written that does not have its final name yet; `write` also updates its SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        return self._file.write(data)


@contextmanager
def atomic_output(
    path: str | Path, size: int = 0, check: Check | None = None, *, new: bool = False
) -> Iterator[AtomicOutput]:
    """Context manager for a file that appears at `path`, complete, when the block ends; if the block raises, never.

    `size`, if known, is the number of bytes to be written: a disk without enough space is refused before anything is
    written. `check` reads the finished file before it gets its final name, instead of comparing hashes, and refuses
    it by raising. The permissions of a replaced file are kept; a symbolic link is replaced, not followed. Raises
    FileError.

    `new`: the name is claimed exclusively, so of several programs that write one file, one succeeds; FileExistsError is
    raised for the others.
    """
    path = Path(path)
    temporary = temporary_name(path.parent, ".tmp")
    try:
        _check_target(path, size)
        with _open_unnamed(temporary) as file:
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
                raise DamagedFile(
                    path, "differs from what was written when read back: the disk or its driver is faulty"
                )
            linked = _link(file, temporary, path, new)
        if linked != path:
            os.replace(linked, path)
        sync_folder(path.parent)
    except OSError as error:
        if new and isinstance(error, FileExistsError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise FileError(path, f"cannot be written: {reason}; the previous content is unchanged") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def temporary_name(folder: Path, ending: str) -> Path:
    """A temporary name in `folder` for an unfinished file; it contains the machine and the process that write it."""
    return folder / f".gouache-{_OWNER}-{secrets.token_hex(4)}-{os.getpid()}{ending}"


def remove_stale_temporaries(folder: Path, ending: str) -> None:
    """Removes the temporary files and folders that killed processes of this machine left in `folder`."""
    for path in folder.glob(f".gouache-{_OWNER}-*{ending}"):
        process = path.stem.rpartition("-")[2]
        if not process.isdecimal() or _is_running(int(process)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _is_running(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 does not test for existence but ends the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _open_unnamed(temporary: Path) -> BufferedRandom:
    """A new file without a name, so that a kill leaves nothing; `temporary` where the system cannot make one."""
    if hasattr(os, "O_TMPFILE"):
        with suppress(OSError):  # not on every file system
            descriptor = os.open(temporary.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
            if Path(f"/proc/self/fd/{descriptor}").exists():
                return open(descriptor, "r+b")  # noqa: PTH123 - closed by the caller
            os.close(descriptor)
    remove_stale_temporaries(temporary.parent, temporary.suffix)
    return temporary.open("x+b")


def _where(file: BinaryIO, temporary: Path) -> Path:
    return temporary if temporary.exists() else Path(f"/proc/self/fd/{file.fileno()}")


def _link(file: BinaryIO, temporary: Path, path: Path, new: bool) -> Path:
    """Gives an unnamed file the name `path` or, if this exists, `temporary`; returns the name it has.

    `new`: FileExistsError instead of the second.
    """
    if temporary.exists():
        if not new:
            return temporary
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return temporary
        return path
    # With src_dir_fd, Python follows the symbolic link in /proc; without, it would make a hard link to that link.
    folder = os.open(temporary.parent, os.O_RDONLY)
    try:
        try:
            os.link(f"/proc/self/fd/{file.fileno()}", path, src_dir_fd=folder)
            return path
        except FileExistsError:
            if new:
                raise
        remove_stale_temporaries(temporary.parent, temporary.suffix)
        os.link(f"/proc/self/fd/{file.fileno()}", temporary, src_dir_fd=folder)
        return temporary
    finally:
        os.close(folder)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Writes `data` as the file `path`, completely or not at all."""
    with atomic_output(path, len(data)) as output:
        output.write(data)


def write_new(path: str | Path, data: bytes) -> None:
    """The same for a file that must not exist. Raises FileExistsError if it does, or another program has made it."""
    with atomic_output(path, len(data), new=True) as output:
        output.write(data)


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    new: bool = False,
) -> str:
    """Writes `tensors` as a safetensors file; returns its SHA-256 in hexadecimal."""
    infos = {name: describe(tensor) for name, tensor in tensors.items()}
    return stream_safetensors(path, infos, tensors.__getitem__, metadata, new=new)


def stream_safetensors(
    path: str | Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    on_bytes: OnBytes | None = None,
    check: Check | None = None,
    new: bool = False,
) -> str:
    """Writes a safetensors file of tensors that `read` returns, one at a time in memory; returns its SHA-256.

    The order is that of the safetensors library: by dtype, widest first, so that every tensor is aligned; then by
    name. `tensors` and `read` of a ModelFile can be passed as `infos` and `read`. `on_bytes` is called after each
    tensor; `check` receives the file before it gets its final name; `new` is that of `atomic_output`. Raises ModelError
    if `read` returns a tensor whose shape or dtype differs from `infos`.
    """
    order = sorted(infos, key=lambda name: (_RANK[infos[name].dtype], name))
    header = _header(path, order, infos, metadata or {})
    total = len(header) + sum(info.nbytes for info in infos.values())
    with atomic_output(path, total, check, new=new) as output:
        output.write(header)
        for name in order:
            output.write(bytes_of(name, read(name), infos[name]))
            if on_bytes is not None:
                on_bytes(infos[name].nbytes)
    return output.digest.hexdigest()


def describe(tensor: torch.Tensor) -> TensorInfo:
    """Shape and dtype (a name of `ITEM_SIZE`) of a tensor. Raises ModelError for a dtype that safetensors lacks."""
    dtype = _DTYPE_NAMES.get(str(tensor.dtype))
    if dtype is None:
        raise ModelError(f"a tensor of dtype {tensor.dtype} cannot be stored in a safetensors file")
    return TensorInfo(tuple(tensor.shape), dtype)


_RANK = {dtype: rank for rank, dtype in enumerate(ITEM_SIZE)}


def _header(path: str | Path, order: list[str], infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise ModelError(f"metadata {printable(str(key), 60)!r} is not text; safetensors metadata is text only")
    if "__metadata__" in infos:
        raise ModelError("a tensor cannot be named '__metadata__': safetensors reserves this name")
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        info = infos[name]
        begin, end = end, end + info.nbytes
        fields[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, end]}
    try:
        text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise FileError(path, "cannot be written: a tensor name or metadata text is not valid Unicode") from None
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(name: str, tensor: torch.Tensor, info: TensorInfo) -> memoryview | bytes:
    """The bytes of `tensor`, row-major and little-endian, without a copy if possible.

    Raises ModelError if `tensor`, which is called `name` in the message, does not match `info`.
    """
    import torch

    found = describe(tensor)
    if found != info:
        raise ModelError(
            f"tensor {printable(name)!r} is {found.dtype} {list(found.shape)}, expected {info.dtype} {list(info.shape)}"
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
    if size and size + min(_SPARE, free // 2) > free:
        reserve = f", and {size_text(_SPARE)} that stay free" if size > _SPARE else ""
        raise FileError(
            path, f"cannot be written: it needs {size_text(size)}{reserve}, but only {size_text(free)} are free there"
        )


def sync_folder(folder: Path) -> None:
    """Flushes the directory entries of `folder` to the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened, and the system makes renaming durable
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files of a data set: ordinary ones, and members of tar shards, which are read in place and never unpacked."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gouache.errors import FileError, RequestError, printable
from gouache.images import pixels
from gouache.outside import open_outside

_SAMPLED = 8192  # bytes at each end that a sampled digest depends on


@dataclass(frozen=True, slots=True)
class Member:
    """`length` bytes at `offset` in the file `shard`, called `name` there.

    `size` is that of the upright picture, from its header, for pictures. `digest` is its `sampled_digest` where it
    identifies the content because whole files are not read before they are used; else "".
    """

    shard: Path
    name: str
    offset: int
    length: int
    size: tuple[int, int] | None = None
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).name.partition(".")[0]


File = Path | Member


def read_bytes(file: File, setting: str) -> bytes:
    """The content of a file of at most `pixels.MAX_BYTES`. Raises RequestError, which names `setting`."""
    if isinstance(file, Path):
        return pixels.read_bytes(file, setting)
    name = printable(str(file))
    if file.length > pixels.MAX_BYTES:
        raise RequestError(setting, f"{name} has {file.length / 1e6:.0f} MB; at most {pixels.MAX_BYTES / 1e6:.0f} MB")
    try:
        with open_outside(file.shard) as shard:
            shard.seek(file.offset)
            data = shard.read(file.length)
    except FileError as error:
        raise RequestError(setting, str(error)) from None
    except OSError as error:
        raise RequestError(setting, f"{name} cannot be read: {error.strerror}") from None
    if len(data) < file.length:
        raise RequestError(setting, f"{name} is cut off: the shard ends before it")
    return data


def read_size(file: File, setting: str) -> tuple[int, int]:
    """(width, height) of a picture, upright, from its header. Raises RequestError."""
    if isinstance(file, Path):
        return pixels.read_size(file, setting)
    return file.size or pixels.size_of(io.BytesIO(read_bytes(file, setting)), str(file), setting)


def state_of(file: File) -> str:
    """Differs for another file, and for another state of the same file; "" if there is none."""
    path = file if isinstance(file, Path) else file.shard
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ""
    part = "" if isinstance(file, Path) else f"|{file.offset}|{file.length}"
    return f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}|{status.st_ino}{part}"


def sampled_digest(length: int, head: bytes, tail: bytes) -> str:
    """A hash, 32 hexadecimal digits, of a file's length and its bytes at both ends.

    `head` and `tail` are its first and last bytes, of which only as many count as are sampled. Compressed pictures that
    differ, differ in these; that of a file of at most 16 kB depends on all its bytes.
    """
    ends = head[:_SAMPLED], tail[-_SAMPLED:]
    return hashlib.blake2b(b"".join(ends), digest_size=16, key=str(length).encode()).hexdigest()


def sampled_ends(length: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(first, count) of the bytes that `sampled_digest` needs as head and tail of a file of `length` bytes."""
    count = min(_SAMPLED, length)
    return (0, count), (length - count, count)

"""The hashes by which web sites and programs identify a file, all computed in one pass."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gouache.errors import DamagedFile
from gouache.outside import open_outside

_PIECE = 1 << 24  # bytes read at once
_V1_START, _V1_LENGTH = 0x100000, 0x10000


@dataclass(frozen=True)
class Hashes:
    """Hexadecimal digests of one file.

    `sha256`: of all bytes. `autov2`: its first 10 digits, as A1111 shows it. `autov1`: A1111's first hash, 8 digits of
    the SHA-256 of 64 KiB at offset 1 MiB; for a shorter file, of no bytes. `autov3`: 12 digits of the SHA-256 of all
    bytes after the header of a safetensors file, so that editing metadata does not change it; "" for other files.
    `crc32`: 8 digits.
    """

    sha256: str
    autov1: str
    autov2: str
    autov3: str
    crc32: str


def hashes(path: Path, on_bytes: Callable[[int], None] | None = None) -> Hashes:
    """All hashes of the file at `path`. Raises FileError if it cannot be read, or changes while it is read."""
    whole, after_header, first, crc, at = hashlib.sha256(), hashlib.sha256(), hashlib.sha256(), 0, 0
    with open_outside(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = _header_end(file.read(9), size)
        file.seek(0)
        try:
            while at < size and (piece := file.read(min(_PIECE, size - at))):
                whole.update(piece)
                crc = zlib.crc32(piece, crc)
                if start is not None:
                    after_header.update(piece[max(0, start - at) :])
                first.update(piece[max(0, _V1_START - at) : max(0, _V1_START + _V1_LENGTH - at)])
                at += len(piece)
                if on_bytes is not None:
                    on_bytes(len(piece))
        except OSError as error:
            raise DamagedFile(path, f"cannot be read: {error.strerror}") from None
        if at < size or os.fstat(file.fileno()).st_size != size:
            raise DamagedFile(path, "was changed by another program while it was read; try again")
    return Hashes(
        sha256=whole.hexdigest(),
        autov1=first.hexdigest()[:8],
        autov2=whole.hexdigest()[:10],
        autov3=after_header.hexdigest()[:12] if start is not None else "",
        crc32=f"{crc:08x}",
    )


def _header_end(begin: bytes, size: int) -> int | None:
    """The offset of the first byte after the header of a safetensors file; None for any other file.

    `begin` are its first 9 bytes.
    """
    if begin[8:] != b"{":
        return None
    start = 8 + int.from_bytes(begin[:8], "little")
    return start if start <= size else None

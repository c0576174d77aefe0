"""The hashes by which web sites and programs identify a file, all computed in one pass."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gouache.files.source import Source

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
    """All hashes of the file at `path`. Raises FileError if it cannot be read."""
    source = Source(path)
    whole, after_header, crc = hashlib.sha256(), hashlib.sha256(), 0
    start = _header_end(source)
    for at in range(0, source.size, _PIECE):
        piece = source.data[at : at + _PIECE]
        whole.update(piece)
        crc = zlib.crc32(piece, crc)
        if start is not None and at + len(piece) > start:
            after_header.update(piece[max(0, start - at) :])
        if on_bytes is not None:
            on_bytes(len(piece))
    first = hashlib.sha256(source.data[_V1_START : _V1_START + _V1_LENGTH])
    return Hashes(
        sha256=whole.hexdigest(),
        autov1=first.hexdigest()[:8],
        autov2=whole.hexdigest()[:10],
        autov3=after_header.hexdigest()[:12] if start is not None else "",
        crc32=f"{crc:08x}",
    )


def _header_end(source: Source) -> int | None:
    """The offset of the first byte after the header of a safetensors file; None for any other file."""
    if source.size < 9 or source.data[8:9] != b"{":
        return None
    start = 8 + int.from_bytes(source.data[:8], "little")
    return start if start <= source.size else None

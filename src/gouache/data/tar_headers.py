"""The headers of a tar file: what is in it and at which bytes, without reading its contents."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512  # bytes
_MAX_EXTENSION = 100_000  # bytes of a long name or of pax records
_MAGIC = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class DamagedTar(ValueError):
    """The file is not a tar file, or not from some byte on. The message is one line without its name."""


@dataclass(frozen=True, slots=True)
class Entry:
    """`length` bytes at `offset`. `regular`: an ordinary file; not a link, folder, device or named pipe."""

    name: str
    offset: int
    length: int
    regular: bool


def entries(file: BinaryIO, size: int) -> Iterator[Entry]:
    """Everything in a tar file of `size` bytes (ustar, GNU, pax), in order.

    Raises DamagedTar where the file stops to be one; what came before is complete.
    """
    position, name, length = 0, "", -1
    while True:
        file.seek(position)
        block = file.read(BLOCK)
        if len(block) == BLOCK and not any(block):
            return
        info = _header(block, position)
        start = position + BLOCK
        extension = info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
        if length >= 0 and not extension:
            info.size = length
        # As tarfile: links and devices have no content, whatever their size says.
        stored = info.size if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES or extension else 0
        if info.size < 0 or start + stored > size:
            raise DamagedTar(f"is cut off within {info.name}")
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise DamagedTar(f"has a sparse file at byte {position}, which is not read")
        position = start + -(-stored // BLOCK) * BLOCK
        if not extension:
            yield Entry(name or info.name, start, stored, info.isreg())
            name, length = "", -1
        elif info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            if stored > _MAX_EXTENSION:
                raise DamagedTar(f"has a name of {stored:,} bytes at byte {start}")
            data = file.read(stored)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                name = data.partition(b"\0")[0].decode("utf-8", "replace")
            else:
                records = _pax(data, start)
                name = records.get("path", name)
                length = _size(records["size"], start) if "size" in records else length


def _header(block: bytes, position: int) -> tarfile.TarInfo:
    if len(block) < BLOCK:
        if position == 0:
            raise DamagedTar("is not a tar file: it has less than 512 bytes")
        raise DamagedTar("is cut off: it has no end mark")
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    except (tarfile.HeaderError, ValueError):
        pass
    if position:
        raise DamagedTar(f"is damaged: byte {position:,} is not the begin of a tar header")
    if kind := _MAGIC.get(block[:2]):
        raise DamagedTar(f"is compressed ({kind}), and shards are read at any position; decompress it first")
    raise DamagedTar("is not a tar file")


def _pax(data: bytes, position: int) -> dict[str, str]:
    """Records of the form "LENGTH KEY=VALUE\\n", where the length is that of the whole record."""
    records, rest = dict[str, str](), data
    while rest.strip(b"\0"):
        digits, _, _ = rest.partition(b" ")
        count = _size(digits.decode("ascii", "replace"), position)
        if not len(digits) + 1 < count <= len(rest):
            raise DamagedTar(f"is damaged: bad pax records at byte {position:,}")
        key, _, value = rest[len(digits) + 1 : count - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        rest = rest[count:]
    return records


def _size(digits: str, position: int) -> int:
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 20):
        raise DamagedTar(f"is damaged: bad pax records at byte {position:,}")
    return int(digits)

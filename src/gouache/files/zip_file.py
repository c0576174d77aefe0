"""Reads the zip archives that torch.save writes, so strictly that no two readers can see different content.

    entry, entry, ...      each a local header, its stored bytes and, if flagged, a descriptor that repeats the sizes
    central directory      one record per entry
    end record             at the very end of the file, with its zip64 form before it

Only uncompressed ("stored") entries are accepted: nothing is inflated, and nothing is extracted by name. Entries must
follow one another without gaps or overlaps, and each local header must agree with the directory. Format: PKWARE's
APPNOTE 6.3.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from gouache.errors import DamagedFile, NotAModel, UnsafeFile, printable
from gouache.files.source import Source, size_text

MAX_ENTRIES = 100_000
MAX_DIRECTORY = 32_000_000  # bytes; 100,000 records as torch writes them are about 8 MB

_LOCAL = struct.Struct("<4s5H3I2H")  # signature, version, flags, method, time, date, crc, packed, size, name, extra
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_ALL_ONES = 0xFFFFFFFF
_HAS_DESCRIPTOR = 1 << 3
_ALLOWED_FLAGS = _HAS_DESCRIPTOR | 1 << 11 | 0b110  # descriptor, UTF-8 names, two bits that stored data ignores


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored entry: `size` bytes at byte `offset` of the file; `crc` is the CRC-32 that the archive states."""

    name: str
    offset: int
    size: int
    crc: int


@dataclass(frozen=True, slots=True)
class _Record:
    """One record of the central directory."""

    raw_name: bytes
    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    header: int


def read_zip(source: Source) -> dict[str, Entry]:
    """All entries by name. Raises DamagedFile or UnsafeFile with the rule that the archive breaks."""
    path = source.path
    start, end, count = _directory(source)
    records = _records(path, source.data[start:end], count)

    folded = {record.name.casefold() for record in records}
    if len(folded) != len(records):
        raise UnsafeFile(path, "holds two entries with one name; different programs would read different ones")
    compressed = [record for record in records if record.method or record.packed != record.size]
    if compressed:
        _refuse_compressed(path, records, compressed[0])

    entries: dict[str, Entry] = {}
    expected = 0
    for record in sorted(records, key=lambda record: record.header):
        if record.header != expected:
            fault = "overlaps the one before it" if record.header < expected else "has a gap before it"
            raise UnsafeFile(path, f"zip entry {printable(record.name)!r} {fault}, at byte {record.header}")
        offset, expected = _extent(source, record, start)
        entries[record.name] = Entry(record.name, offset, record.size, record.crc)
    if expected != start:
        raise UnsafeFile(path, f"has {size_text(start - expected)} that belong to no zip entry, at byte {expected}")
    return entries


def _directory(source: Source) -> tuple[int, int, int]:
    """(start, end, number of records) of the central directory, from the end record."""
    path, data, size = source.path, source.mapped, source.size
    at = size - _END.size
    if at < 0 or data[at : at + 4] != b"PK\x05\x06":
        if 0 <= data.rfind(b"PK\x05\x06", max(0, at - 0xFFFF)) < at:
            raise DamagedFile(path, "has bytes after the end of its zip archive, which PyTorch never writes")
        raise DamagedFile(path, f"ends before its zip directory (it has {size_text(size)}): the download is incomplete")
    _, disk, first_disk, here, count, length, start, comment = _END.unpack_from(data, at)
    if disk or first_disk or here != count or comment:
        raise DamagedFile(path, "is a multi-part zip archive, or has a comment; PyTorch writes neither")

    end = at
    locator = at - _LOCATOR.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\x06\x07":
        end = locator - _END64.size
        _, disk, where, disks = _LOCATOR.unpack_from(data, locator)
        if end < 0 or disk or disks != 1 or where != end or data[end : end + 4] != b"PK\x06\x06":
            raise DamagedFile(path, "its zip64 end record is not at the position that its locator states")
        _, _, _, _, disk, first_disk, here64, count64, length64, start64 = _END64.unpack_from(data, end)
        short = (count, length, start)
        long = (count64, length64, start64)
        agree = all(value in (ones, full) for value, ones, full in zip(short, (0xFFFF, _ALL_ONES, _ALL_ONES), long))
        if disk or first_disk or here64 != count64 or not agree:
            raise DamagedFile(path, "its zip64 end record contradicts its plain end record")
        count, length, start = long
    if start + length != end:
        raise DamagedFile(
            path, "its zip directory is not at the position that its end record states: cut, joined or damaged"
        )
    if count > MAX_ENTRIES or length > MAX_DIRECTORY:
        raise UnsafeFile(path, f"lists {count:,} zip entries in {size_text(length)}; no model has so many")
    return start, end, count


def _records(path: Path, directory: bytes, count: int) -> list[_Record]:
    records: list[_Record] = []
    at = 0
    for _ in range(count):
        if directory[at : at + 4] != b"PK\x01\x02" or at + _CENTRAL.size > len(directory):
            raise DamagedFile(path, f"its zip directory ends after {len(records)} of {count} records")
        fields = _CENTRAL.unpack_from(directory, at)
        _, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment, disk, _, _, header = fields
        at += _CENTRAL.size
        raw_name = directory[at : at + name_length]
        extra = directory[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment
        if at > len(directory) or disk:
            raise DamagedFile(path, f"record {len(records)} of its zip directory is damaged")
        if flags & ~_ALLOWED_FLAGS:
            raise UnsafeFile(path, "holds encrypted or otherwise special zip entries, which PyTorch never writes")
        try:
            name = raw_name.decode()
        except UnicodeDecodeError:
            raise DamagedFile(
                path, f"record {len(records)} of its zip directory has a name that is not UTF-8"
            ) from None
        size, packed, header = _zip64_values(path, extra, [size, packed, header])
        records.append(_Record(raw_name, name, flags, method, crc, packed, size, header))
    if at != len(directory):
        raise DamagedFile(path, "its zip directory has bytes after its last record")
    return records


def _zip64_values(path: Path, extra: bytes, values: list[int]) -> list[int]:
    """`values` with each 0xFFFFFFFF replaced by the next 8-byte number of the zip64 field in `extra`."""
    if _ALL_ONES not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        body = extra[at + 4 : at + 4 + length]
        if kind == 1 and len(body) == length and length >= 8 * values.count(_ALL_ONES):
            full = iter(struct.unpack_from(f"<{length // 8}Q", body))
            return [next(full) if value == _ALL_ONES else value for value in values]
        at += 4 + length
    raise DamagedFile(path, "a large zip entry lacks its zip64 sizes")


def _extent(source: Source, record: _Record, limit: int) -> tuple[int, int]:
    """(first byte of the entry's content, end of the entry), after checking that its local header agrees."""
    path, data, at = source.path, source.mapped, record.header

    def wrong(fault: str) -> UnsafeFile:
        return UnsafeFile(path, f"zip entry {printable(record.name)!r} {fault}")

    if at + _LOCAL.size > limit or data[at : at + 4] != b"PK\x03\x04":
        raise wrong(f"has no local header at byte {at}")
    _, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL.unpack_from(data, at)
    name_at = at + _LOCAL.size
    offset = name_at + name_length + extra_length
    end = offset + record.size
    if end > limit:
        raise wrong("reaches past the zip directory")
    if data[name_at : name_at + name_length] != record.raw_name or (flags, method) != (record.flags, record.method):
        raise wrong("differs between its local header and the directory")

    if flags & _HAS_DESCRIPTOR and (crc, packed, size) == (0, 0, 0):
        # The zip64 form first: the plain form of an empty entry is a prefix of it.
        for width in ("Q", "I") if record.size < _ALL_ONES else ("Q",):
            form = struct.pack(f"<4sI2{width}", b"PK\x07\x08", record.crc, record.size, record.size)
            if data[end : end + len(form)] == form:
                return offset, end + len(form)
        raise wrong("differs in size or checksum between its descriptor and the directory")

    size, packed = _zip64_values(path, data[offset - extra_length : offset], [size, packed])
    if (crc, packed, size) != (record.crc, record.packed, record.size):
        raise wrong("differs in size or checksum between its local header and the directory")
    return offset, end


def is_torch_script(names: Iterable[str]) -> bool:
    """Whether a PyTorch archive with these entries holds a program (its code entries are compressed)."""
    return any(_TORCH_SCRIPT.fullmatch(name) for name in names)


_TORCH_SCRIPT = re.compile(r"(?:[^/]*/)?(?:code/.*|constants\.pkl)", re.DOTALL)


def torch_script_error(path: Path) -> NotAModel:
    return NotAModel(path, "is a TorchScript program, not weights: get the weights as .safetensors")


def _refuse_compressed(path: Path, records: list[_Record], first: _Record) -> NoReturn:
    if is_torch_script(record.name for record in records):
        raise torch_script_error(path)
    if any(record.name.endswith("data.pkl") for record in records):
        raise UnsafeFile(
            path,
            f"zip entry {printable(first.name)!r} is compressed, which PyTorch never does and which could expand "
            "without limit: refused",
        )
    raise NotAModel(
        path, f"is an ordinary zip archive ({printable(first.name)!r}, ...): unpack it and open its content"
    )

"""Reads the safetensors format, as strictly as its specification.

    8 bytes   length n of the header, little-endian
    n bytes   JSON: {"name": {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}, ...}, padded with spaces
    the rest  the tensors, one after another, without gaps or overlaps

Format: https://github.com/huggingface/safetensors. The header is parsed entry by entry and not by one call of a JSON
parser, which would turn a hostile header of the allowed 100 MB into gigabytes of Python objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

from gouache.errors import DamagedFile, UnsafeFile, printable
from gouache.files.record import ITEM_SIZE, ModelFile, Reader, TensorInfo
from gouache.files.source import Source, size_text, truncated_error

MAX_HEADER = 100_000_000  # the limit of the format
MAX_TENSORS = 100_000  # the largest Stable Diffusion training state has about 20,000
MAX_TEXT = 128_000_000  # bytes of memory for all names and metadata
MAX_DIMENSIONS = 16

# Possessive quantifiers: a long string must not be backtracked, nor saved character by character.
_STRING = re.compile(rb'[ \t\r\n]*+"((?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+)"[ \t\r\n]*+')
_ENTRY = re.compile(rb"[ \t\r\n]*+(\{[^{}]{0,4000}+\})[ \t\r\n]*+")
_SPACE = re.compile(rb"[ \t\r\n]*+")


def open_safetensors(path: str | Path) -> ModelFile:
    """The file as a record; only its header is read. Raises DamagedFile or UnsafeFile that states the broken rule."""
    return read_safetensors(Source(path))


def read_safetensors(source: Source) -> ModelFile:
    """Same as `open_safetensors`, for a file that is already open."""
    path, size = source.path, source.size
    if size < 8:
        raise DamagedFile(path, f"is {size} bytes long: too short for a safetensors file")
    length = int.from_bytes(source.data[:8], "little")
    if length > MAX_HEADER:
        raise DamagedFile(path, f"claims a header of {size_text(length)}; safetensors allows 100 MB at most")
    if length > size - 8:
        raise truncated_error(path, size, 8 + length)
    header = source.data[8 : 8 + length]
    if not header.startswith(b"{"):
        raise DamagedFile(path, "is not a valid safetensors file: its header must begin with '{'")
    entries, metadata = _Header(path, header).read()

    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        tensors[name], begin, end = _tensor(path, name, entry)
        spans.append((begin, end, name))
    start = 8 + length
    _check_layout(path, sorted(spans), size - start, start)
    offsets = {name: start + begin for begin, _, name in spans}

    return ModelFile(
        path=path,
        format="safetensors",
        tensors=tensors,
        read=Reader(
            lambda name: source.read_tensor(offsets[name], tensors[name]),
            lambda name: source.map_tensor(offsets[name], tensors[name]),
        ),
        metadata=metadata,
        files=(path,),
    )


class _Header:
    """A parser of the header's JSON; `read` is the whole grammar."""

    def __init__(self, path: Path, text: bytes) -> None:
        self.path = path
        self.text = text
        self.position = 0
        self.memory = 0

    def read(self) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        entries: dict[str, dict[str, Any]] = {}
        metadata: dict[str, str] | None = None
        for name in self.members():
            if name == "__metadata__":
                if metadata is not None:
                    raise self.broken("holds '__metadata__' twice")
                metadata = {}
                for key in self.members():
                    if key in metadata:
                        raise self.broken(f"holds the metadata key {printable(key)!r} twice")
                    metadata[key] = self.string("a metadata value that is not text")
            else:
                if name in entries:
                    raise self.broken(f"holds the name {printable(name)!r} twice")
                if len(entries) == MAX_TENSORS:
                    raise UnsafeFile(self.path, f"lists more than {MAX_TENSORS:,} tensors; no model has so many")
                entries[name] = self.entry(name)
        if self.text[self.position :].strip(b" \t\r\n"):  # JSON's white space, as the official reader allows
            raise self.broken("goes on after its closing brace")
        return entries, metadata or {}

    def members(self) -> Iterable[str]:
        """The keys of one object. Consumes its braces, commas and colons; the caller consumes each value."""
        self.expect(b"{")
        self.position += 1
        if self.expect(b'"}') == b"}":
            self.position += 1
            return
        mark = b","
        while mark == b",":
            key = self.string("a name that is not text")
            self.expect(b":")
            self.position += 1
            yield key
            mark = self.expect(b",}")
            self.position += 1

    def expect(self, marks: bytes) -> bytes:
        """Skips white space and returns the next byte, which must be one of `marks` and is not consumed."""
        self.position = _SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]
        mark = self.text[self.position : self.position + 1]
        if not mark or mark not in marks:
            raise self.broken(f"is not valid JSON at byte {8 + self.position}: expected one of {marks.decode()}")
        return mark

    def string(self, otherwise: str) -> str:
        found = _STRING.match(self.text, self.position)
        if found is None:
            raise self.broken(f"has {otherwise} at byte {8 + self.position}")
        raw = found[1]
        # Before decoding: one character above U+FFFF makes Python use four bytes for every character.
        self.memory += len(raw) if raw.isascii() else 4 * len(raw)
        if self.memory > MAX_TEXT:
            raise UnsafeFile(self.path, f"has more than {size_text(MAX_TEXT)} of names and metadata")
        try:
            text: str = json.loads(b'"' + raw + b'"') if b"\\" in raw else raw.decode()
            text.encode()  # fails for a lone surrogate that was written as an escape
        except UnicodeError:
            raise self.broken(f"has text that is not valid Unicode at byte {8 + self.position}") from None
        self.position = found.end()
        return text

    def entry(self, name: str) -> dict[str, Any]:
        found = _ENTRY.match(self.text, self.position)
        if found is None:
            raise self.broken(f"does not describe tensor {printable(name)!r} as dtype, shape and data_offsets")
        self.position = found.end()
        try:
            return _DECODER.decode(found[1].decode())
        except (ValueError, RecursionError):
            raise self.broken(f"is not valid JSON in the entry of tensor {printable(name)!r}") from None

    def broken(self, fault: str) -> DamagedFile:
        return DamagedFile(self.path, f"its safetensors header {fault}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key occurs twice")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def _tensor(path: Path, name: str, entry: dict[str, Any]) -> tuple[TensorInfo, int, int]:
    """Checks one entry and returns (info, begin, end), with offsets counted from the end of the header."""

    def wrong(fault: str) -> DamagedFile:
        return DamagedFile(path, f"tensor {printable(name)!r} {fault}")

    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise wrong(f"has the unknown dtype {printable(str(dtype), 40)!r}")
    if not _natural_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise wrong(f"has an invalid shape: {printable(str(shape), 60)}")
    if not _natural_numbers(offsets) or len(offsets) != 2:
        raise wrong(f"has invalid data_offsets: {printable(str(offsets), 60)}")
    info = TensorInfo(tuple(shape), dtype)
    begin, end = offsets
    if end - begin != info.nbytes:
        raise wrong(f"of shape {shape} and dtype {dtype} needs {info.nbytes} bytes, but has {end - begin}")
    return info, begin, end


def _natural_numbers(value: Any) -> TypeGuard[list[int]]:
    # type() instead of isinstance, for which JSON's true and false are integers too
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_layout(path: Path, spans: list[tuple[int, int, str]], size: int, start: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    expected = 0
    for begin, end, name in spans:
        if begin != expected:
            fault = "overlaps the one before it" if begin < expected else "has a gap before it"
            raise DamagedFile(path, f"tensor {printable(name)!r} {fault}, at byte {start + begin}")
        expected = end
    if expected > size:
        raise truncated_error(path, start + size, start + expected)
    if expected < size:
        raise DamagedFile(path, f"has {size_text(size - expected)} after its last tensor that belong to no tensor")

"""Entries of caches in safetensors files: named tensors under a key, each with a hash, so that damage is found.

A file holds one or many entries. It is written completely or not at all, also if the process is killed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from gouache.errors import FileError, GouacheError
from gouache.files.record import ModelFile
from gouache.files.safetensors_file import open_safetensors
from gouache.files.write import bytes_of, describe, write_safetensors

Entry = Mapping[str, Tensor]


def key_of(*parts: str) -> str:
    """A key, and a file name, for everything that an entry depends on."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def write(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write `entries` {key: {name: tensor}}. Raises FileError, for instance if the disk is full."""
    make_folder(path.parent)
    tensors = {f"{key}.{name}": tensor for key, entry in entries.items() for name, tensor in entry.items()}
    write_safetensors(path, tensors, {key: _digest(entry) for key, entry in entries.items()})


def make_folder(folder: Path) -> None:
    """Raises FileError if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(folder, f"cannot be made: {error.strerror}") from None


def open_entries(path: Path) -> ModelFile | None:
    """The file, whose `metadata` has the keys of its entries; None if it is missing or damaged."""
    try:
        return open_safetensors(path)
    except GouacheError:
        return None


def read(file: ModelFile, key: str) -> dict[str, Tensor] | None:
    """The tensors of an entry by name; None if it is not in the file, or damaged."""
    names = {name.partition(".")[2]: name for name in file if name.partition(".")[0] == key}
    try:
        entry = {name: file.read(full) for name, full in names.items()}
    except GouacheError:
        return None
    return entry if entry and _digest(entry) == file.metadata.get(key) else None


def _digest(entry: Entry) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(entry.items()):
        info = describe(tensor)
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        digest.update(bytes_of(name, tensor, info))
    return digest.hexdigest()

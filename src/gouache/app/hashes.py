"""Hashes of files and models, cached until the file changes, because hashing gigabytes takes seconds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from gouache.app.cache import file_key, read_cache, write_cache
from gouache.app.settings import Settings
from gouache.errors import FileError, RequestError, printable
from gouache.files import record
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.outside import open_outside
from gouache.workshop import hashes as workshop

_CACHE_FILE = "hashes.json"
_DIGITS = {"sha256": 64, "autov1": 8, "autov2": 10, "autov3": 12, "crc32": 8}

OnWork = Callable[[str, int, int], None]


def sha256(file: ModelFile, settings: Settings, on_bytes: Callable[[int], None] | None = None) -> str:
    """The hash of a model: of its file, or, if it has several files, of their hashes. Raises FileError.

    `on_bytes` is called with the number of bytes just read.
    """
    return _cached(_key_of(list(file.files)), lambda: file.sha256(on_bytes), settings)


def sha256_of(path: Path, settings: Settings) -> str:
    """The hash of a file that need not be a model that can be opened. Raises FileError."""
    open_outside(path).close()
    return _cached(_key_of([path]), lambda: record.sha256_of(path), settings)


def read_now(path: Path, on_work: OnWork | None = None) -> str:
    """The hash of the model at `path`, computed even if one is cached. Raises FileError."""
    files = list(open_model(path).files) if path.is_dir() else [path]
    for each in files:
        open_outside(each).close()  # a named pipe or a device would never end
    size, done = sum(each.stat().st_size for each in files), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if on_work is not None:
            on_work("hashing", done, size)

    return open_model(path).sha256(on_bytes) if path.is_dir() else record.sha256_of(path, on_bytes)


def _key_of(paths: list[Path]) -> str:
    try:
        return file_key(paths)
    except OSError as error:
        raise FileError(error.filename or paths[0], f"cannot be read: {error.strerror}") from None
    except RuntimeError as error:  # a loop of links
        raise FileError(paths[0], f"cannot be read: {printable(str(error))}") from None


def _cached(key: str, compute: Callable[[], str], settings: Settings) -> str:
    store = settings.cache / _CACHE_FILE
    cached = read_cache(store).get(key)
    if _is_digest(cached, 64):
        return str(cached)
    digest = compute()
    # Read again: another process may have added entries meanwhile.
    write_cache(store, {**read_cache(store), key: digest})
    return digest


def hashes(path: Path, settings: Settings, on_work: OnWork | None = None) -> workshop.Hashes:
    """All hashes of one file. Raises FileError if it cannot be read, RequestError for a folder."""
    if path.is_dir():
        raise RequestError("file", f"{printable(str(path))} is a folder; only files have hashes")
    open_outside(path).close()
    key, size = f"all|{_key_of([path])}", path.stat().st_size
    store = settings.cache / _CACHE_FILE
    if (cached := _all_from_json(read_cache(store).get(key))) is not None:
        return cached
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if on_work is not None:
            on_work("hashing", done, size)

    found = workshop.hashes(path, on_bytes)
    write_cache(store, {**read_cache(store), key: asdict(found), _key_of([path]): found.sha256})
    return found


def _all_from_json(value: object) -> workshop.Hashes | None:
    """None for what is damaged or was written by another version."""
    if not isinstance(value, dict) or set(value) != set(_DIGITS):
        return None
    if not all(
        _is_digest(value[name], digits) or (name, value[name]) == ("autov3", "") for name, digits in _DIGITS.items()
    ):
        return None
    return workshop.Hashes(**value)


def _is_digest(value: object, digits: int) -> bool:
    return isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{digits}}}", value) is not None

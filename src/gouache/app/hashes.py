"""Hashes of files and models, cached by path, size and modification time, because hashing gigabytes takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from gouache.app.cache import file_key, read_cache, write_cache
from gouache.app.settings import Settings
from gouache.errors import FileError, RequestError
from gouache.files import record
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.workshop import hashes as workshop

_CACHE_FILE = "hashes.json"

OnWork = Callable[[str, int, int], None]


def sha256(file: ModelFile, settings: Settings, on_bytes: Callable[[int], None] | None = None) -> str:
    """The hash of a model: of its file, or, if it has several files, of their hashes.

    `on_bytes` is called with the number of bytes just read.
    """
    return _cached(file_key(file.files), lambda: file.sha256(on_bytes), settings)


def sha256_of(path: Path, settings: Settings) -> str:
    """The hash of a file that need not be a model that can be opened."""
    return _cached(file_key([path]), lambda: record.sha256_of(path), settings)


def read_now(path: Path, on_work: OnWork | None = None) -> str:
    """The hash of the model at `path`, computed even if one is cached. Raises FileError."""
    files = list(open_model(path).files) if path.is_dir() else [path]
    size, done = sum(each.stat().st_size for each in files), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if on_work is not None:
            on_work("hashing", done, size)

    return open_model(path).sha256(on_bytes) if path.is_dir() else record.sha256_of(path, on_bytes)


def _cached(key: str, compute: Callable[[], str], settings: Settings) -> str:
    store = settings.cache / _CACHE_FILE
    cached = read_cache(store)
    if key in cached:
        return str(cached[key])
    digest = compute()
    # Read again: another process may have added entries meanwhile.
    write_cache(store, {**read_cache(store), key: digest})
    return digest


def hashes(path: Path, settings: Settings, on_work: OnWork | None = None) -> workshop.Hashes:
    """All hashes of one file. Raises FileError if it cannot be read, RequestError for a folder."""
    if path.is_dir():
        raise RequestError("file", f"{path} is a folder; only files have hashes")
    try:
        key, size = f"all|{file_key([path])}", path.stat().st_size
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from None
    store = settings.cache / _CACHE_FILE
    if isinstance(value := read_cache(store).get(key), dict):
        try:
            return workshop.Hashes(**value)
        except TypeError:
            pass  # written by another version
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if on_work is not None:
            on_work("hashing", done, size)

    found = workshop.hashes(path, on_bytes)
    write_cache(store, {**read_cache(store), key: asdict(found), file_key([path]): found.sha256})
    return found

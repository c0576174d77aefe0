"""Hashes of files, remembered by path, size and time, because gigabytes take seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from gouache.app.library import file_key, read_cache, write_cache
from gouache.app.settings import Settings
from gouache.errors import FileError, RequestError
from gouache.workshop import hashes as workshop

_STORE = "hashes.json"


def hashes(path: Path, settings: Settings, on_work: Callable[[str, int, int], None] | None = None) -> workshop.Hashes:
    """All hashes of one file. Raises FileError where it cannot be read, RequestError for a folder."""
    if path.is_dir():
        raise RequestError("file", f"{path} is a folder; hashes are of files")
    try:
        key, size = f"all|{file_key([path])}", path.stat().st_size
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from None
    store = settings.cache / _STORE
    known = read_cache(store)
    if isinstance(value := known.get(key), dict):
        try:
            return workshop.Hashes(**value)
        except TypeError:
            pass  # of another version
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if on_work is not None:
            on_work("hashing", done, size)

    found = workshop.hashes(path, on_bytes)
    write_cache(store, {**known, key: asdict(found)})
    return found

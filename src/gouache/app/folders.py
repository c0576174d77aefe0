"""The folders and files that the user added to the library: `folders.json` in the data folder, a list of paths."""

from __future__ import annotations

import json
import stat
from pathlib import Path

from gouache.app.cache import make_private
from gouache.errors import FileError
from gouache.files.write import write_atomic
from gouache.outside import MalformedText, parse_json, read_outside, reason

_NAME = "folders.json"
_ADVICE = "delete it to start with no added folders"


def added(data: Path) -> list[Path]:
    """The paths, in the order in which they were added. Raises FileError if the list cannot be read."""
    store = data / _NAME
    try:
        if not store.exists() and not store.is_symlink():
            return []
        paths = parse_json(read_outside(store))
    except FileError as error:
        raise FileError(store, f"{reason(error)}; {_ADVICE}") from None
    except OSError as error:
        raise FileError(store, f"cannot be read: {error.strerror}") from None
    except MalformedText as error:
        raise FileError(store, f"{error}; {_ADVICE}") from None
    if not isinstance(paths, list) or not all(isinstance(each, str) and "\0" not in each for each in paths):
        raise FileError(store, f"is not a list of paths; {_ADVICE}")
    return [Path(each) for each in paths]


def add(data: Path, path: Path) -> bool:
    """Add `path`; False if it was added before. Raises FileError if it does not exist or the list cannot be written."""
    path = _absolute(path)
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            next(path.iterdir(), None)  # raises if it must not be read
    except OSError as error:
        missing = "does not exist; give a folder of models, a model file or an extra_model_paths.yaml"
        raise FileError(path, missing if isinstance(error, FileNotFoundError) else _reason(error)) from None
    before = added(data)
    if path in before:
        return False
    _write(data, [*before, path])
    return True


def remove(data: Path, path: Path) -> bool:
    """Remove `path` from the list; False if it was not in it. No file is deleted."""
    before = added(data)
    path = _absolute(path)
    if path not in before:
        return False
    _write(data, [each for each in before if each != path])
    return True


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError:  # ~user with an unknown user
        return path.absolute()


def _reason(error: OSError) -> str:
    return f"cannot be read: {error.strerror}"


def _write(data: Path, paths: list[Path]) -> None:
    try:
        make_private(data)
    except OSError as error:
        raise FileError(data, f"the folder cannot be created: {error.strerror}") from None
    # Escaped: a path in the bytes of a file system need not be valid Unicode.
    write_atomic(data / _NAME, json.dumps([str(each) for each in paths], indent=1).encode())

"""The folders and files that the user added to the library: `folders.json` in the data folder, a list of paths."""

from __future__ import annotations

import json
from pathlib import Path

from gouache.errors import FileError
from gouache.files.write import write_atomic

_NAME = "folders.json"


def added(data: Path) -> list[Path]:
    """The paths, in the order in which they were added. Raises FileError if the list cannot be read."""
    store = data / _NAME
    try:
        paths = json.loads(store.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise FileError(store, f"cannot be read ({error}); delete it to start with no added folders") from None
    if not isinstance(paths, list) or not all(isinstance(each, str) for each in paths):
        raise FileError(store, "is not a list of paths; delete it to start with no added folders")
    return [Path(each) for each in paths]


def add(data: Path, path: Path) -> bool:
    """Add `path`; False if it was added before. Raises FileError if it does not exist or the list cannot be written."""
    path = path.expanduser().absolute()
    if not path.exists():
        raise FileError(path, "does not exist; give a folder of models, a model file or an extra_model_paths.yaml")
    before = added(data)
    if path in before:
        return False
    _write(data, [*before, path])
    return True


def remove(data: Path, path: Path) -> bool:
    """Remove `path` from the list; False if it was not in it. No file is deleted."""
    before = added(data)
    path = path.expanduser().absolute()
    if path not in before:
        return False
    _write(data, [each for each in before if each != path])
    return True


def _write(data: Path, paths: list[Path]) -> None:
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(data, f"the folder cannot be created: {error.strerror}") from None
    write_atomic(data / _NAME, json.dumps([str(each) for each in paths], indent=1, ensure_ascii=False).encode())

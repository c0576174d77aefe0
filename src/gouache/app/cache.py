"""Small JSON files in the cache folder, and a key that changes when a file changes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from gouache.errors import FileError
from gouache.files.write import write_atomic
from gouache.outside import MalformedText, parse_json, read_outside


def file_key(paths: Iterable[Path]) -> str:
    """Differs for other files and for another state of the same files.

    Size and modification time alone are not enough: tools that copy can keep both. The inode and the time of the last
    change of it, which no program can set, show that a file was replaced. Raises OSError.
    """
    return "|".join(_key(path) for path in sorted(paths))


def _key(path: Path) -> str:
    status = path.stat()
    # On Windows st_ctime is the time of creation, which is no worse.
    return f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}:{status.st_ctime_ns}"


def read_cache(path: Path) -> dict[str, object]:
    """The JSON object in a cache file; empty if the file is missing or damaged."""
    try:
        value = parse_json(read_outside(path))
        return value if isinstance(value, dict) else {}
    except (OSError, FileError, MalformedText):
        return {}


def write_cache(path: Path, values: dict[str, object]) -> None:
    """Write `values`. A cache folder that cannot be written is no error: it only costs time at the next start."""
    try:
        make_private(path.parent)
        write_atomic(path, json.dumps(values, indent=1).encode())
    except (OSError, FileError):
        return


def make_private(folder: Path) -> None:
    """Create `folder` for this user only: notes, tags and paths are private. Raises OSError."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)

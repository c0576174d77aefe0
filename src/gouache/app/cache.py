"""Small JSON files in the cache folder, and a key that changes when a file changes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from gouache.errors import FileError
from gouache.files.write import write_atomic


def file_key(paths: Iterable[Path]) -> str:
    """Paths, sizes and modification times: differs for other files and for another state of the same files."""
    return "|".join(f"{path.resolve()}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in sorted(paths))


def read_cache(path: Path) -> dict[str, object]:
    """The JSON object in a cache file; empty if the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def write_cache(path: Path, values: dict[str, object]) -> None:
    """Write `values`. A cache folder that cannot be written is no error: it only costs time at the next start."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(values, indent=1).encode())
    except (OSError, FileError):
        return

"""Small JSON files in the cache folder, and the key that tells a file from what it was before."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from gouache.errors import FileError
from gouache.files.write import write_atomic


def file_key(paths: Iterable[Path]) -> str:
    """What tells files from others and from what they were before: paths, sizes, times."""
    return "|".join(f"{path.resolve()}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in sorted(paths))


def read_cache(path: Path) -> dict[str, object]:
    """A JSON object kept in the cache folder; empty where there is none, or a damaged one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def write_cache(path: Path, values: dict[str, object]) -> None:
    """Keep `values`; a cache folder that cannot be written costs time next time and nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(values, indent=1).encode())
    except (OSError, FileError):
        return

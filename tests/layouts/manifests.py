"""The official key lists of tests/keys, as names and shapes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

KEYS = Path(__file__).parent.parent / "keys"

Shapes = dict[str, tuple[int, ...]]


def manifest(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes()))


def shapes(name: str, prefix: str = "") -> Shapes:
    """Shapes of the tensors under `prefix` in the manifest of a single file, without the prefix."""
    return {key.removeprefix(prefix): tuple(v[0]) for key, v in manifest(name).items() if key.startswith(prefix)}


def folder_shapes(name: str, component: str) -> Shapes:
    """Shapes of the tensors of one component in the manifest of a diffusers folder."""
    return {key: tuple(v[0]) for key, v in manifest(name)[component]["tensors"].items()}

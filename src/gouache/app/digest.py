"""The SHA-256 of a model, read now, whatever is remembered of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from gouache.files.open import open_model


def digest_of(path: Path, on_work: Callable[[str, int, int], None] | None = None) -> str:
    """Of a file's bytes; of a folder, as `ModelFile.sha256` has it. Raises OSError or FileError."""
    if path.is_dir():
        return open_model(path).sha256()
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
            done += len(piece)
            if on_work is not None:
                on_work("hashing", done, size)
    return digest.hexdigest()

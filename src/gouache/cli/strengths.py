"""Files with a strength behind a colon, as LoRAs are named: style.safetensors:0.8."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from gouache.app.names import resolve
from gouache.app.settings import Settings


def strengths(texts: Iterable[str], settings: Settings) -> list[tuple[Path, float]]:
    """Each text as (file, strength), 1 where none is given. A colon that no number follows is part of the name."""
    found = []
    for text in texts:
        match = re.fullmatch(r"(.+):([-+]?\d+(?:\.\d+)?)", text)
        name, strength = (match[1], float(match[2])) if match else (text, 1.0)
        found.append((resolve(name, settings), strength))
    return found

"""Arguments of the form FILE:STRENGTH, such as style.safetensors:0.8."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from gouache.app.names import resolve
from gouache.app.settings import Settings


def strengths(texts: Iterable[str], settings: Settings) -> list[tuple[Path, float]]:
    """(file, strength) of each text; the strength defaults to 1. A colon without a number behind it is not special."""
    parsed = []
    for text in texts:
        match = re.fullmatch(r"(.+):([-+]?\d+(?:\.\d+)?)", text)
        name, strength = (match[1], float(match[2])) if match else (text, 1.0)
        parsed.append((resolve(name, settings), strength))
    return parsed

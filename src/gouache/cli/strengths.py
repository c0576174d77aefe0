"""Arguments of the form FILE:STRENGTH, such as style.safetensors:0.8."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from gouache.app.names import resolve
from gouache.app.settings import Settings
from gouache.errors import RequestError, printable

_MAX_STRENGTH = 10_000.0


def strengths(texts: Iterable[str], settings: Settings) -> list[tuple[Path, float]]:
    """(file, strength) of each text; the strength defaults to 1. A colon without a number behind it is not special.

    Raises RequestError for a strength that is too large, or a name that no file has.
    """
    parsed = []
    for text in texts:
        match = re.fullmatch(r"(.+):([-+]?\d+(?:\.\d+)?)", text)
        name, strength = (match[1], float(match[2])) if match else (text, 1.0)
        if abs(strength) > _MAX_STRENGTH:
            raise RequestError("strength", f"{printable(text, 80)}: expected a number up to {_MAX_STRENGTH:g}")
        parsed.append((resolve(name, settings), strength))
    return parsed

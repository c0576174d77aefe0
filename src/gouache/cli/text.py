"""What commands print of outside text: nothing that a terminal would act on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gouache.errors import printable

_LONGEST = 4096  # characters of a path


def shown(path: str | Path) -> str:
    """A path, whole, on one line."""
    return printable(str(path), _LONGEST)


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON that is readable and safe on a terminal: control and direction characters are escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    if text.isprintable():
        return text
    # Line breaks are those of `indent`: in strings, JSON escapes them.
    return "".join(each if each.isprintable() or each == "\n" else _escaped(each) for each in text)


def _escaped(character: str) -> str:
    """As in JSON: one or, above U+FFFF, two units of UTF-16."""
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))

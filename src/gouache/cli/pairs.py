"""Options of the form KEY=VALUE."""

from __future__ import annotations

from collections.abc import Iterable

from gouache.errors import RequestError, printable


def pairs(option: str, texts: Iterable[str]) -> dict[str, str]:
    """["a=1"] -> {"a": "1"}. Raises RequestError for a text without an equals sign or a key."""
    values = dict[str, str]()
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise RequestError(option, f"{printable(text, 80)!r} is not KEY=VALUE")
        values[key.strip()] = value
    return values

"""Options of the form KEY=VALUE."""

from __future__ import annotations

from collections.abc import Iterable

from gouache.errors import RequestError


def pairs(option: str, texts: Iterable[str]) -> dict[str, str]:
    """{"a": "1"} of ["a=1"]. Raises RequestError for one without a sign of equality, or without a key."""
    found = dict[str, str]()
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise RequestError(option, f"{text!r} is not of the form KEY=VALUE")
        found[key.strip()] = value
    return found

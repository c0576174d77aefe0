"""Small helpers for the text that commands print."""

from __future__ import annotations


def plural(count: int, noun: str, several: str = "") -> str:
    """The count with its noun: "1 model", "0 models", "2 models". `several` is an irregular plural."""
    return f"{count} {noun if count == 1 else several or noun + 's'}"

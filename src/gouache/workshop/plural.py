"""Counted nouns for messages: "1 tensor", "3 tensors"."""

from __future__ import annotations


def plural(count: int, noun: str, several: str = "") -> str:
    """The count with its noun; `several` is an irregular plural."""
    return f"{count} {noun if count == 1 else several or noun + 's'}"

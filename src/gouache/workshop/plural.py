"""Counted nouns for messages: "1 tensor", "3 tensors"."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`count` with `noun` in the singular or the plural; `plural` where that is not `noun` with an "s"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"

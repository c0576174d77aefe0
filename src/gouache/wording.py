"""Small helpers for the text that commands print."""

from __future__ import annotations


def plural(count: int, noun: str, several: str = "") -> str:
    """The count with its noun: "1 model", "0 models", "2 models". `several` is an irregular plural."""
    return f"{count} {noun if count == 1 else several or noun + 's'}"


def duration(seconds: float) -> str:
    """A time as a person says it: "1.5 h", "12 min", "45 s", "0.7 s"."""
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds > 90:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"

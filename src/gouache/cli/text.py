"""What commands print of outside text: nothing that a terminal would act on."""

from __future__ import annotations

from pathlib import Path

from gouache.errors import printable

_LONGEST = 4096  # characters of a path


def shown(path: str | Path) -> str:
    """A path, whole, on one line."""
    return printable(str(path), _LONGEST)

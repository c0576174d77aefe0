"""What the recipe's commands share: an error is one line and exit code 2, and a file written is told with its hash."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from gouache.errors import GouacheError


def ended(work: Callable[[], None]) -> int:
    """Do `work`; the exit code."""
    try:
        work()
    except GouacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def tell_written(path: Path, digest: str) -> None:
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, sha256 {digest}")

"""What the recipe's commands share: how they end (in an error, one line and 2; by Ctrl-C, 130) and what they tell."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from gouache.errors import GouacheError

Item = TypeVar("Item")


def ended(work: Callable[[], None]) -> int:
    """Do `work`; the exit code."""
    try:
        work()
    except GouacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def counted(items: Sequence[Item], doing: str) -> Iterator[Item]:
    """The items one by one, and after each a line with the time left."""
    began = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        left = (time.monotonic() - began) / number * (len(items) - number)
        print(f"{doing}: {number} of {len(items)}, {left / 60:.0f} min left", flush=True)


def tell_written(path: Path, digest: str) -> None:
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, sha256 {digest}")

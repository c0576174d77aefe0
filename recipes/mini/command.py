"""Shared by the recipe's commands: exit codes (2 for an error, in one line; 130 for Ctrl-C) and progress output."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from gouache.errors import GouacheError
from gouache.training.loop import Progress

Item = TypeVar("Item")


def run_command(work: Callable[[], None]) -> int:
    """Run `work`; returns the exit code."""
    try:
        work()
    except GouacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def with_progress(items: Sequence[Item], label: str, every: int = 1) -> Iterator[Item]:
    """Yield the items, and after each, or each `every`th, print a line with the time left."""
    began = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        left = (time.monotonic() - began) / number * (len(items) - number)
        if number % every == 0 or number == len(items):
            print(f"{label}: {number} of {len(items)}, {left / 60:.0f} min left", file=sys.stderr, flush=True)


def print_progress(progress: Progress) -> None:
    """Print a line about a training run."""
    loss, left = progress.losses["loss"], progress.left / 60
    print(f"step {progress.step}/{progress.steps}  loss {loss:.4f}  {left:.0f} min left", file=sys.stderr, flush=True)


def print_written(path: Path, digest: str) -> None:
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, sha256 {digest}")

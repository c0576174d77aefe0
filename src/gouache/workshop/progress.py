"""Progress of long work: bytes of tensors, summed up for a callback."""

from __future__ import annotations

from collections.abc import Callable

OnWork = Callable[[str, int, int], None]
"""Progress callback: (what is being done, units done, units in all); the units are bytes unless stated otherwise."""


def progress(what: str, total: int, on_work: OnWork | None) -> Callable[[int], None] | None:
    """A callback that receives the bytes of one tensor after the other and reports their sum to `on_work`."""
    if on_work is None:
        return None
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_work(what, done, total)

    return on_bytes

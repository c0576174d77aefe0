"""Ctrl-C and SIGTERM as a request to stop that the loop polls between steps."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether a stop was requested.

    First signal: the loop finishes its step, saves and returns. Second signal: KeyboardInterrupt at once; the last
    checkpoint remains. Outside the main thread no signal can be handled and the function always returns False.
    """
    requested = False

    def handle(_signal: int, _frame: object) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: its caller stops the loop by `should_stop` or `seconds`
        previous = {}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

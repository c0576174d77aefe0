"""Requests from outside that the loop polls between steps: Ctrl-C and SIGTERM stop it, SIGUSR1 or a file saves."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gouache.errors import TrainingError, printable
from gouache.training.distributed import ALONE, World

SAVE_NOW = "save-now"
"""The name of a file in the run's folder: when it appears, a checkpoint is saved and the file is removed."""

_ONE = 0.2  # seconds in which signals are one: `timeout` and others send it to a process and to its group
_ONE_OF_SEVERAL = 10.0  # likewise if torchrun passes it on, which the terminal has sent to all processes already


class Requests:
    """What was requested so far. `stop` remains, with the number of its signal; `saving()` reports a request once."""

    def __init__(self, folder: Path, world: World = ALONE) -> None:
        self.stop = False
        self._one = _ONE if world.size == 1 else _ONE_OF_SEVERAL
        self._is_main = world.is_main
        self.signal = 0
        self._at = 0.0
        self._save = False
        self._file = folder / SAVE_NOW

    def saving(self) -> bool:
        if self._is_main and self._file.exists():
            self._save = True
            try:
                self._file.unlink()
            except OSError as error:
                raise TrainingError(f"{printable(str(self._file))}: cannot be removed ({error.strerror})") from None
        requested, self._save = self._save, False
        return requested

    def on_stop(self, number: int, _frame: object) -> None:
        if self.stop and time.monotonic() - self._at > self._one:
            raise KeyboardInterrupt
        if not self.stop:
            self.stop, self.signal, self._at = True, int(number), time.monotonic()

    def on_save(self, number: int, _frame: object) -> None:
        self._save = True


@contextmanager
def requests(folder: Path, world: World = ALONE) -> Iterator[Requests]:
    """Within the block signals become requests.

    First signal to stop: the loop finishes its step, saves and returns. Second signal: KeyboardInterrupt at once; the
    last checkpoint remains. Outside the main thread no signal can be handled; the file still works.
    """
    found = Requests(folder, world)
    handlers = {signal.SIGINT: found.on_stop, signal.SIGTERM: found.on_stop}
    if hasattr(signal, "SIGUSR1"):
        handlers[signal.SIGUSR1] = found.on_save
    try:
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    except ValueError:  # not the main thread: its caller stops the loop by `should_stop` or `seconds`
        previous = {}
    try:
        yield found
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

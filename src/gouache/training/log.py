"""`log.jsonl`: the measurements of a run, one JSON object per line, each step once however often it was killed.

`times.jsonl` has the same form and says how long everything took. It is a file of its own, because times differ from
run to run, and everything in the log is the same in a run that was killed and one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from gouache.errors import TrainingError, printable
from gouache.files.write import write_atomic
from gouache.outside import parse_json, read_text

Result = TypeVar("Result")
Line = dict[str, Any]

LOG, TIMES = "log.jsonl", "times.jsonl"
_MOST = 1 << 30  # bytes; a million steps with a line each take 150 MB


class Log:
    """Appends to `path`. Opened at `step`, it first removes the lines of later steps, since they will be repeated.

    `lines` are those of the file.
    """

    def __init__(self, path: Path, step: int) -> None:
        """Raises FileError if the old log cannot be read or written."""
        self.path = path
        self.lines: list[Line] = []
        self.return_to(step)

    def return_to(self, step: int) -> None:
        """Remove the lines of steps after `step`."""
        if self.path.exists():
            text = read_text(self.path, _MOST, errors="replace")
            kept = [(line, values) for line, values in _parsed(text) if values["step"] <= step]
            shorter = "".join(f"{line}\n" for line, _ in kept)
            if shorter != text:
                write_atomic(self.path, shorter.encode())
            self.lines = [values for _, values in kept]

    def write(self, **values: float) -> None:
        """One line of named numbers, with six significant digits. Raises TrainingError, as on a full disk."""
        line = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise TrainingError(
                f"{printable(str(self.path))}: cannot be written: {error.strerror}; the checkpoints are kept, start "
                "the run again to resume it"
            ) from None
        self.lines.append(line)


def read_lines(path: Path) -> list[Line]:
    """The lines of a log that may be in use, without those that are incomplete. Raises FileError."""
    return [values for _, values in _parsed(read_text(path, _MOST, errors="replace"))]


class Clock:
    """How many seconds were spent on what, and other amounts, since the last `take`."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._spent: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - began)

    def add(self, name: str, amount: float) -> None:
        self._spent[name] = self._spent.get(name, 0) + amount

    def measured(self, name: str, call: Callable[[int], Result]) -> Callable[[int], Result]:
        """`call`, whose time counts as `name`."""

        def timed(number: int) -> Result:
            with self.measure(name):
                return call(number)

        return timed

    def take(self) -> dict[str, float]:
        """The "seconds" since the last call, and the amount of each name."""
        now = time.monotonic()
        values = {"seconds": now - self._began, **self._spent}
        self._began, self._spent = now, {}
        return values


def _parsed(text: str) -> Iterator[tuple[str, Line]]:
    """(line, its values) of each whole line with a step; a killed run may have written half a line."""
    for line in text.splitlines():
        try:
            values = parse_json(line)
            whole = math.isfinite(values["step"])
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
        if whole:
            yield line, values

"""The progress of a training run on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gouache.errors import printable
from gouache.wording import duration

if TYPE_CHECKING:
    from gouache.training.loop import Progress as Measured

_SECONDS = 30  # between lines where there is no terminal


class TrainingProgress:
    """`show` receives the loop's measurements, `work` (what, done, total) of the preparation, `note` lines to keep."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[numbers]}"), console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("preparing", total=None, numbers="")
        self._printed = time.monotonic()

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        if self._console.is_terminal:  # above the bar
            self._bar.console.print(
                f"note: {printable(text, sys.maxsize)}", markup=False, highlight=False, soft_wrap=True
            )
        else:
            print(f"note: {text}", file=sys.stderr, flush=True)

    def work(self, what: str, done: int, total: int) -> None:
        """Progress of `what` before the first step: reading pictures, filling the cache, painting samples."""
        self._bar.update(self._task, description=what, completed=done, total=total, numbers="")
        self._print(f"{what} {done}/{total}")

    def show(self, measured: Measured) -> None:
        loss = measured.losses.get("loss")
        numbers = "" if loss is None else f"loss {loss:.4f}"
        numbers += "" if measured.rate is None else f"  rate {measured.rate:.2e}"
        self._bar.update(
            self._task, description="training", completed=measured.step, total=measured.steps, numbers=numbers
        )
        done, steps = measured.step, measured.steps
        self._print(f"step {done}/{steps}  {numbers}  {duration(round(measured.left))} left", last=done == steps)

    def _print(self, line: str, last: bool = False) -> None:
        now = time.monotonic()
        if not self._console.is_terminal and (last or now - self._printed >= _SECONDS):
            self._printed = now
            print(line, file=sys.stderr, flush=True)

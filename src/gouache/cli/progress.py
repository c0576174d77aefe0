"""The progress bar: steps a second and the time left, on stderr, and only where somebody looks."""

from __future__ import annotations

import math
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from gouache.diffusion.samplers.sampler import Step


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.2f} steps/s" if speed >= 1 else f"{1 / speed:.2f} s/step")


class Steps:
    """A bar over all steps of all batches; `on_step` is what a sampler reports to."""

    def __init__(self, count: int, batch: int) -> None:
        self._batches = math.ceil(count / batch)
        self._done = 0
        self._bar = Progress(
            TextColumn("painting"),
            BarColumn(),
            MofNCompleteColumn(),
            _Speed(),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # through a pipe, what is printed must not end up on stderr
            disable=not Console(stderr=True).is_terminal,
        )
        self._task = self._bar.add_task("painting", total=None)

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def on_step(self, step: Step) -> None:
        self._done += 1
        self._bar.update(self._task, total=self._batches * step.count, completed=self._done)

    def close(self) -> None:
        self._bar.stop()

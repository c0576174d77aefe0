"""Progress bars: how much is done, how fast, and the time left; on stderr, and only where somebody looks."""

from __future__ import annotations

import math
import sys
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from gouache.errors import printable

if TYPE_CHECKING:
    from gouache.diffusion.samplers.sampler import Step


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.2f} steps/s" if speed >= 1 else f"{1 / speed:.2f} s/step")


class Bar:
    """One line that is gone when the work is done."""

    def __init__(self, *columns: ProgressColumn) -> None:
        console = Console(file=getattr(sys.stderr, "raw", sys.stderr))  # it writes control characters on purpose
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *columns,
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # through a pipe, what is printed must not end up on stderr
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def show(self, what: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=printable(what), total=total, completed=done)

    def close(self) -> None:
        self._bar.stop()


class Steps(Bar):
    """A bar over all steps of all batches; `on_step` is what a sampler reports to."""

    def __init__(self, count: int, batch: int) -> None:
        super().__init__(MofNCompleteColumn(), _Speed())
        self._batches = math.ceil(count / batch)
        self._batch = 0
        self._over = True

    def __enter__(self) -> Steps:
        super().__enter__()
        return self

    def on_step(self, step: Step) -> None:
        if step.index == 0 and self._over:
            self._batch += 1
        self._over = step.index == step.count - 1
        self.show("painting", (self._batch - 1) * step.count + step.index + 1, self._batches * step.count)


def bytes_bar() -> Bar:
    """A bar over bytes; its `show` is what the workshop reports to."""
    return Bar(DownloadColumn(), TransferSpeedColumn())

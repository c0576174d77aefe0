"""What a run reports while it trains: lines of its log and of its times, progress, and notes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gouache.training.log import LOG, TIMES, Clock, Log
from gouache.training.position import Position
from gouache.training.snapshot import Run
from gouache.training.stability import overfitting
from gouache.training.state import OnNote


@dataclass(frozen=True)
class Progress:
    """Passed to `on_log`. `seconds` is the time since this call of `train` began, `left` the estimated time left.

    `rate` is the learning rate of the step and `norm` that of its gradient before clipping.
    """

    step: int
    steps: int
    losses: Mapping[str, float]
    seconds: float
    left: float
    rate: float
    norm: float


class Recorder:
    """Writes `log.jsonl` and `times.jsonl` in `folder`, of a run that begins or resumes at `step`."""

    def __init__(
        self, run: Run, folder: Path, step: int, on_log: Callable[[Progress], None] | None, on_note: OnNote
    ) -> None:
        self.clock = Clock()
        self._run, self._first, self._on_log, self._on_note = run, step, on_log, on_note
        # Only the main process writes.
        self._log = Log(folder / LOG, step) if run.world.is_main else None
        self._times = Log(folder / TIMES, step) if run.world.is_main else None
        self._overfits = self._log is not None and bool(overfitting(self._log.lines))
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """The time since the recorder was made."""
        return time.monotonic() - self._began

    def step(self, position: Position, losses: Mapping[str, Tensor], norm: float | Tensor) -> None:
        """Log the step that led to `position`, if it is time to; it was skipped if it has no losses.

        The numbers are the same whenever the run reaches this step.
        """
        settings = self._run.settings
        if self._log is None or not settings.is_due(position.step, settings.log_steps):
            return
        rate, values = settings.rate(position.step - 1), {name: float(value) for name, value in losses.items()}
        line: dict[str, float] = {"step": position.step, "rate": rate}
        if losses:
            line |= {"norm": float(norm), **values}
        if self._run.ema is not None and not self._run.sharded:
            line["ema gap"] = self._run.ema.gap(self._run.masters.exact)
        if position.skipped:
            line["skipped"] = len(position.skipped)
        self._log.write(**line)
        if self._on_log is not None and losses:
            left = self.seconds / max(1, position.step - self._first) * (settings.steps - position.step)
            progress = Progress(position.step, settings.steps, values, self.seconds, left, rate, float(norm))
            self._on_log(progress)

    def validation(self, position: Position, scores: Mapping[str, float]) -> None:
        """Log the results of a validation; over-fitting is reported when it is first seen."""
        if self._log is None:
            return
        self._log.write(step=position.step, **{f"validation {name}": value for name, value in scores.items()})
        remark = overfitting(self._log.lines)
        if remark and not self._overfits:
            self._on_note(remark)
        self._overfits = bool(remark)

    def saved(self, written: int) -> None:
        """Count a checkpoint of so many bytes; 0 if there was nothing to save."""
        self.clock.add("saves", 1 if written else 0)
        self.clock.add("bytes", written)

    def times(self, position: Position) -> None:
        """Log how the time since the last such line was spent, if it is time to."""
        if self._times is not None and self._run.settings.is_due(position.step, self._run.settings.log_steps):
            self._times.write(step=position.step, **self.clock.take())

    def return_to(self, step: int) -> None:
        """Remove the lines of later steps, which will be repeated."""
        for log in filter(None, (self._log, self._times)):
            log.return_to(step)

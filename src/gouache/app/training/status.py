"""What a run has done and how stable it is, read from its folder; it may be training meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gouache.app.training import folder as run_folder
from gouache.app.training.folder import RunFolder
from gouache.training import state
from gouache.training.changes import Change
from gouache.training.stability import Stability, read_stability, stability
from gouache.wording import plural


@dataclass(frozen=True)
class Status:
    """`step` is that of the newest measurement, `saved` the steps of the checkpoints."""

    path: Path
    mode: str
    running: bool
    step: int
    steps: int
    loss: float | None
    rate: float | None
    validation: float | None
    best: float | None
    saved: tuple[int, ...]
    bytes: int
    changed: float
    stability: Stability
    changes: tuple[str, ...]

    @property
    def remarks(self) -> tuple[str, ...]:
        """What needs a look: over-fitting, an unstable loss, checkpoints written too often or too seldom."""
        return self.stability.remarks

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    def lines(self) -> Iterator[str]:
        """For a terminal or a page, one fact each."""
        share = f"{self.step / self.steps:.0%}" if self.steps else "0%"
        what = "running" if self.running else "finished" if self.finished else "stopped"
        yield f"{self.mode}, {what}: step {self.step} of {self.steps} ({share})"
        if self.loss is not None:
            rate = f", learning rate {self.rate:.3g}" if self.rate is not None else ""
            yield f"loss {self.loss:.4g}{rate}"
        if self.validation is not None:
            best = f", lowest {self.best:.4g}" if self.best is not None else ""
            yield f"validation loss {self.validation:.4g}{best}"
        if (found := self.stability).slope is not None and found.spread is not None:
            yield f"loss over the last steps: {found.slope:+.1%} per 1,000 steps, spread {found.spread:.1%}"
        if found.norm is not None:
            gap = f", averages differ from the weights by {found.ema_gap:.2%}" if found.ema_gap is not None else ""
            yield f"gradient norm {found.norm:.3g}{gap}"
        if found.saving is not None and found.waiting is not None:
            written = f", {found.bytes_per_hour / 1e6:,.0f} MB written per hour" if found.bytes_per_hour else ""
            yield f"time: {found.saving:.1%} saving, {found.waiting:.1%} waiting for data{written}"
        if self.saved:
            numbers = ", ".join(map(str, self.saved[-8:]))
            yield f"{plural(len(self.saved), 'checkpoint')}, {self.bytes / 1e6:,.1f} MB: step {numbers}"
        else:
            yield "no checkpoint yet"


def status(run: RunFolder) -> Status:
    """Raises GouacheError if the run's settings or log cannot be read."""
    settings, lines = run.settings(), run.log()
    _, losses = run_folder.curve(lines, "loss")
    _, rates = run_folder.curve(lines, "rate")
    _, validation = run_folder.curve(lines, "validation loss")
    checkpoints = state.checkpoints(run.path)
    files = [path for each in checkpoints for path in each.iterdir() if path.is_file()]
    log = run.path / "log.jsonl"
    return Status(
        path=run.path,
        mode=settings.mode,
        running=state.is_locked(run.path),
        step=max([int(line["step"]) for line in lines] + run.steps(), default=0),
        steps=settings.train.steps,
        loss=losses[-1] if losses else None,
        rate=rates[-1] if rates else None,
        validation=validation[-1] if validation else None,
        best=min(validation, default=None),
        saved=tuple(run.steps()),
        bytes=sum(path.stat().st_size for path in files),
        changed=log.stat().st_mtime if log.exists() else time.time(),
        stability=read_stability(run.path) if log.exists() else stability([], []),
        changes=tuple(_described(Change(**each)) for each in run.state().get("changes", ())),
    )


def _described(change: Change) -> str:
    return f"step {change.step}: {change.name} {change.before!r} -> {change.after!r}"

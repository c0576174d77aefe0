"""What a run has done and how stable it is, read from its folder; it may be training meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gouache.app.training import folder as run_folder
from gouache.app.training.folder import RunFolder
from gouache.training import state
from gouache.training.changes import Change
from gouache.training.log import TIMES, read_lines
from gouache.training.stability import WINDOW, Stability, read_stability, stability
from gouache.wording import duration, plural


@dataclass(frozen=True)
class Status:
    """`step` is that of the newest measurement, `saved` the steps of the checkpoints, `bytes` their size.

    `window` are the last steps, over which the stability is measured. `validation` is the newest validation loss,
    `best` the lowest, of step `best_step`. `left` are the seconds until the last step at the present speed, None if it
    is not known. `early`: patience has ended the run before its last step.
    """

    path: Path
    mode: str
    running: bool
    step: int
    steps: int
    left: float | None
    window: int
    loss: float | None
    rate: float | None
    validation: float | None
    best: float | None
    best_step: int | None
    early: bool
    saved: tuple[int, ...]
    bytes: int
    changed: float
    model: str
    sha256: str
    data: str
    output: str
    stability: Stability
    changes: tuple[str, ...]

    @property
    def remarks(self) -> tuple[str, ...]:
        """What needs a look: over-fitting, an unstable loss, checkpoints written too often or too seldom."""
        return self.stability.remarks

    @property
    def finished(self) -> bool:
        return self.step >= self.steps or self.early

    @property
    def state(self) -> str:
        if self.running:
            return "running"
        if self.early and self.step < self.steps:
            return "stopped early"
        if self.finished:
            return "finished"
        return "stopped" if self.step or self.saved else "not started"

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["stability"].pop("remarks")
        return {
            **values, "path": str(self.path), "state": self.state, "finished": self.finished,
            "remarks": list(self.remarks),
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """For a terminal or a page, one fact each."""
        share = f"{self.step / self.steps:.0%}" if self.steps else "0%"
        left = f", {duration(self.left)} left" if self.running and self.left is not None else ""
        yield f"{self.mode}, {self.state}: step {self.step} of {self.steps} ({share}){left}"
        if self.loss is not None:
            rate = f", learning rate {self.rate:.3g}" if self.rate is not None else ""
            yield f"loss {self.loss:.4g}{rate}"
        if self.validation is not None:
            best = f", lowest {self.best:.4g} at step {self.best_step}" if self.best is not None else ""
            yield f"validation loss {self.validation:.4g}{best}"
        if (found := self.stability).slope is not None and found.spread is not None:
            change = found.slope * self.window / 1000
            yield f"loss over the last {plural(self.window, 'step')}: {change:+.1%}, spread {found.spread:.1%}"
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
    settings, lines, values = run.settings(), run.log(), run.state()
    at, losses = run_folder.curve(lines, "loss")
    _, rates = run_folder.curve(lines, "rate")
    measured, validation = run_folder.curve(lines, "validation loss")
    best = min(range(len(validation)), key=validation.__getitem__, default=None)
    saved, steps, patience = tuple(run.steps()), settings.train.steps, settings.train.patience
    step = max([int(line["step"]) for line in lines] + list(saved), default=0)
    stable = read_stability(run.path) if run.log_file.exists() else stability([], [])
    objective = values.get("objective")
    return Status(
        path=run.path,
        mode=settings.title,
        running=state.is_locked(run.path),
        step=step,
        steps=steps,
        left=_left(run, steps - step) if step < steps else None,
        window=at[-1] - at[-WINDOW:][0] if at else 0,
        loss=losses[-1] if losses else None,
        rate=rates[-1] if rates else None,
        validation=validation[-1] if validation else None,
        best=None if best is None else validation[best],
        best_step=None if best is None else measured[best],
        early=0 < patience <= int(values.get("waiting", 0)),
        saved=saved,
        bytes=sum(_size(run.checkpoint(each)) for each in saved),
        changed=(run.log_file if run.log_file.exists() else run.settings_file).stat().st_mtime,
        model=settings.model.name,
        sha256=settings.model.sha256,
        data=str(objective.get("data", "")) if isinstance(objective, dict) else "",
        output=settings.output,
        stability=stable,
        changes=tuple(_described(Change(**each)) for each in values.get("changes", ())),
    )


def _left(run: RunFolder, steps: int) -> float | None:
    """The seconds that `steps` more steps will take, by the newest measured ones."""
    lines = read_lines(run.path / TIMES)[-WINDOW:] if (run.path / TIMES).exists() else []
    if len(lines) < 2 or lines[-1]["step"] <= lines[0]["step"]:
        return None
    seconds = sum(line.get("seconds", 0.0) for line in lines[1:])
    return max(0, steps) * seconds / (lines[-1]["step"] - lines[0]["step"])


def _size(checkpoint: Path) -> int:
    """The bytes of a checkpoint, which the run may remove meanwhile."""
    try:
        return sum(path.stat().st_size for path in checkpoint.iterdir() if path.is_file())
    except OSError:
        return 0


def _described(change: Change) -> str:
    return f"step {change.step}: {change.name} {change.before!r} -> {change.after!r}"

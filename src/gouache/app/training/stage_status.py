"""What the stages of a training have done, and what those that are left will take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gouache.app.settings import Settings
from gouache.app.training import estimate
from gouache.app.training.estimate import Estimate
from gouache.app.training.folder import is_run
from gouache.app.training.stage_checks import check, with_existing_model
from gouache.app.training.stage_file import Stage, read, to_do
from gouache.app.training.status import Status, status
from gouache.errors import printable
from gouache.files.source import size_text
from gouache.wording import duration


@dataclass(frozen=True)
class StageStatus:
    """`status` is None for a stage that has not begun."""

    stage: Stage
    status: Status | None

    def to_json(self) -> dict[str, Any]:
        own = None if self.status is None else self.status.to_json()
        start = None if self.stage.start is None else self.stage.start.name
        return {
            "name": self.stage.name, "mode": self.stage.mode, "start": start, "result": str(self.stage.result),
            "has_result": self.stage.has_result, "run": own,
        }  # fmt: skip


def all_status(path: Path) -> list[StageStatus]:
    """What every stage has done. Raises GouacheError."""
    _, stages = read(path)
    return [StageStatus(each, status(each.folder) if is_run(each.folder.path) else None) for each in stages]


def lines(found: Sequence[StageStatus]) -> Iterator[str]:
    """A table for a terminal."""
    rows = [("stage", "mode", "state", "step", "loss", "validation", "result")]
    for each in found:
        stage, own = each.stage, each.status
        measured = (None, None) if own is None else (own.loss, own.validation)
        loss, validation = ("" if value is None else f"{value:.4g}" for value in measured)
        done = f"{0 if own is None else own.step} of {stage.settings.train.steps}"
        result = printable(str(stage.result)) if stage.has_result else ""
        rows.append(
            (stage.name, stage.mode, "not started" if own is None else own.state, done, loss, validation, result)
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def estimate_all(path: Path, user: Settings, *, on_note: Callable[[str], None]) -> list[tuple[Stage, Estimate]]:
    """What each stage that is not done will take. Models that do not exist yet are taken to be like their start's."""
    _, stages = read(path)
    check(stages, user, True)
    return [
        (stage, estimate.estimate(with_existing_model(stage, user), stage.folder, user, on_note=on_note))
        for stage in to_do(stages)
    ]


def fits(found: Sequence[tuple[Stage, Estimate]]) -> bool:
    """Whether each stage fits, and all of them on the disk."""
    return all(each.fits for _, each in found) and _disk(found) <= min((each.disk_free for _, each in found), default=0)


def estimate_lines(found: Sequence[tuple[Stage, Estimate]]) -> Iterator[str]:
    """For a terminal: each stage, then the sum."""
    for stage, each in found:
        yield f"stage {stage.name}"
        yield from (f"  {line}" for line in each.lines())
    seconds, disk = sum(each.steps * each.step_seconds for _, each in found), _disk(found)
    time = "time not measured" if math.isnan(seconds) else duration(seconds)
    yield f"in all  {sum(each.steps for _, each in found)} steps, {time}, {size_text(disk)} of disk"
    if all(each.fits for _, each in found) and not fits(found):
        yield "advice  all of them need more disk than is free: keep fewer checkpoints (train.keep), or free some space"


def _disk(found: Sequence[tuple[Stage, Estimate]]) -> int:
    """The bytes that stay when all are done."""
    return sum(each.cache_bytes + each.checkpoints * each.checkpoint_bytes + each.output_bytes for _, each in found)

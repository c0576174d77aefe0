"""How a run is going, from its `log.jsonl` and `times.jsonl`: numbers and remarks in plain words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from gouache.training.log import LOG, TIMES, Line, read_lines

WINDOW = 100  # lines of the log
SAVING = 0.05  # of the time spent on checkpoints, above which they are too frequent
WAITING = 0.02  # of the time spent waiting for data, above which more workers help
AT_RISK = 1800.0  # seconds of work that a crash may cost
_WORSE, _VALIDATIONS = 0.01, 3  # over-fitting: so much worse than the best, and so often since


@dataclass(frozen=True)
class Stability:
    """Numbers of the last `WINDOW` lines of a run's log; None where it has too few of them.

    `slope` is the change of the loss per 1,000 steps by a straight line, as a share of its mean, and `spread` the
    deviation from that line, also as a share. `ema_gap` is the distance of averaged and last weights as a share of
    their norm, `norm` the median norm of the gradient. `waiting` and `saving` are shares of the time: waiting for data
    and saving. `between` are the seconds between checkpoints, `bytes_per_hour` what is written.
    """

    steps: int
    slope: float | None
    spread: float | None
    ema_gap: float | None
    norm: float | None
    waiting: float | None
    saving: float | None
    between: float | None
    bytes_per_hour: float | None
    remarks: tuple[str, ...]


def read_stability(folder: Path) -> Stability:
    """The stability of the run in `folder`, which may be running. Raises FileError if it has no log."""
    times = read_lines(folder / TIMES) if (folder / TIMES).exists() else []
    return stability(read_lines(folder / LOG), times)


def stability(log: Sequence[Line], times: Sequence[Line]) -> Stability:
    lines = [line for line in log if _is_number(line.get("loss"))][-WINDOW:]
    steps, losses = [float(line["step"]) for line in lines], [float(line["loss"]) for line in lines]
    slope, spread = _trend(steps, losses)
    recent = times[-WINDOW:]
    seconds = sum(line.get("seconds", 0.0) for line in recent)
    saves = sum(line.get("saves", 0) for line in recent)
    share = lambda name: sum(line.get(name, 0.0) for line in recent) / seconds if seconds else None  # noqa: E731
    found = Stability(
        steps=int(log[-1]["step"]) if log else 0,
        slope=slope,
        spread=spread,
        ema_gap=_last(log, "ema gap"),
        norm=_median([float(line["norm"]) for line in lines if _is_number(line.get("norm"))]),
        waiting=share("data"),
        saving=share("saving"),
        between=seconds / saves if saves else None,
        bytes_per_hour=3600 * sum(line.get("bytes", 0) for line in recent) / seconds if seconds else None,
        remarks=(),
    )
    unsaved = _seconds_since_save(times)
    remarks = [*_of_loss(found, lines), *_of_saving(found, unsaved), overfitting(log), *_of_skipped(log)]
    return Stability(**{**vars(found), "remarks": tuple(remark for remark in remarks if remark)})


def overfitting(log: Sequence[Line]) -> str:
    """One line if the validation loss has risen since its best while the training loss fell; "" otherwise.

    The training loss is that of the probe, or else the mean of the loss between validations.
    """
    scores = [line for line in log if _is_number(line.get("validation loss"))]
    if len(scores) < _VALIDATIONS + 1:
        return ""
    losses = [float(line["validation loss"]) for line in scores]
    best = min(range(len(losses)), key=losses.__getitem__)
    since = losses[best + 1 :][-_VALIDATIONS:]
    if len(since) < _VALIDATIONS or min(since) <= losses[best] * (1 + _WORSE):
        return ""
    trained = [_training_loss(log, scores, index) for index in range(len(scores))]
    then, now = trained[best], trained[-1]
    if then is None or now is None or now >= then:
        return ""
    return (
        f"over-fitting: since step {scores[best]['step']:.0f} the validation loss has risen from {losses[best]:.4g} "
        f"to {losses[-1]:.4g}, while the training loss fell from {then:.4g} to {now:.4g}; use the checkpoint of that "
        "step, or train with more pictures, a lower rate or a lower rank"
    )


def _training_loss(log: Sequence[Line], scores: Sequence[Line], index: int) -> float | None:
    """The training loss at a validation."""
    probe = scores[index].get("validation training loss")
    if _is_number(probe):
        return float(probe)
    after = scores[index - 1]["step"] if index else -math.inf
    between = [
        float(line["loss"]) for line in log
        if _is_number(line.get("loss")) and after < line["step"] <= scores[index]["step"]
    ]  # fmt: skip
    return statistics.fmean(between) if between else None


def _of_loss(found: Stability, lines: Sequence[Line]) -> list[str]:
    remarks = []
    if found.slope is not None and found.spread is not None and len(lines) >= 20:
        rise = found.slope * (lines[-1]["step"] - lines[0]["step"]) / 1000
        if rise > max(0.1, 2 * found.spread):
            remarks.append(f"the loss rises ({100 * rise:.0f} % over the last {len(lines)} lines): lower learning_rate")
    norms = [float(line["norm"]) for line in lines if _is_number(line.get("norm"))]
    if found.norm and max(norms[-10:]) > 20 * found.norm:
        remarks.append(
            f"gradients reach {max(norms[-10:]):.3g}, their median is {found.norm:.3g}: clip_norm limits what they do"
        )
    return remarks


def _of_saving(found: Stability, unsaved: float) -> list[str]:
    remarks = []
    if found.saving is not None and found.saving > SAVING:
        remarks.append(
            f"checkpoints take {100 * found.saving:.0f} % of the time: save less often (save_seconds, save_steps)"
        )
    elif max(found.between or 0.0, unsaved) > AT_RISK:
        minutes = max(found.between or 0.0, unsaved) / 60
        remarks.append(f"a crash can cost {minutes:.0f} minutes of work: save more often (save_seconds)")
    if found.waiting is not None and found.waiting > WAITING:
        remarks.append(f"{100 * found.waiting:.0f} % of the time is spent waiting for data: use more workers or caches")
    return remarks


def _of_skipped(log: Sequence[Line]) -> list[str]:
    skipped = int(_last(log, "skipped") or 0)
    steps = f"{skipped} step{'s' if skipped > 1 else ''}"
    return [f"{steps} skipped, because a loss or gradient was not finite"] if skipped else []


def _trend(x: Sequence[float], y: Sequence[float]) -> tuple[float | None, float | None]:
    """(slope per 1,000, deviation from the line) of y over x, both as shares of the mean of y."""
    mean = statistics.fmean(y) if y else 0.0
    if len(y) < 3 or not mean or len(set(x)) < 2:
        return None, None
    line = statistics.linear_regression(x, y)
    rest = [value - line.slope * at - line.intercept for at, value in zip(x, y)]
    return 1000 * line.slope / abs(mean), statistics.pstdev(rest) / abs(mean)


def _seconds_since_save(times: Sequence[Line]) -> float:
    seconds = 0.0
    for line in times:
        seconds = 0.0 if line.get("saves") else seconds + line.get("seconds", 0.0)
    return seconds


def _last(log: Sequence[Line], name: str) -> float | None:
    return next((float(line[name]) for line in reversed(log) if _is_number(line.get(name))), None)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and math.isfinite(value)

"""How far a run is: steps, batches, skipped steps, and the validation losses that decide what is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gouache.training.objective import Json
from gouache.training.settings import Settings


@dataclass
class Position:
    """The part of a run's state that is neither tensors nor settings.

    `step` steps are done and batch `number` is the next. `skipped` are the steps, counted from 0, that change nothing,
    because their gradients were not finite. `best` are the lowest validation losses with their steps, in order.
    `lowest` is the loss that later validations must improve on, and `waiting` is how many have not done so.
    """

    step: int = 0
    number: int = 0
    skipped: list[int] = field(default_factory=list)
    best: list[tuple[float, int]] = field(default_factory=list)
    lowest: float = math.inf
    waiting: int = 0

    def advance(self, settings: Settings) -> None:
        self.step += 1
        self.number += settings.accumulate

    def validated(self, loss: float, settings: Settings) -> bool:
        """Record the validation loss of the present step; returns whether its weights are among those to keep.

        A loss that is not finite improves on nothing.
        """
        if loss < self.lowest - (settings.minimum_change if math.isfinite(self.lowest) else 0):
            self.lowest, self.waiting = loss, 0
        else:
            self.waiting += 1
        if not math.isfinite(loss):
            return False
        self.best = sorted([*self.best, (loss, self.step)])[: settings.keep_best]
        return any(step == self.step for _, step in self.best)

    def forget_validation(self) -> None:
        """For losses that cannot be compared with the earlier ones."""
        self.best, self.lowest, self.waiting = [], math.inf, 0

    def without_patience(self, settings: Settings) -> bool:
        """Whether so many validations have not improved that the run ends."""
        return 0 < settings.patience <= self.waiting

    def values(self) -> dict[str, Json]:
        return {
            "step": self.step,
            "number": self.number,
            "skipped": list(self.skipped),
            "best": self.best[0][0] if self.best else None,
            "ranking": [list(each) for each in self.best],
            "lowest": self.lowest if math.isfinite(self.lowest) else None,
            "waiting": self.waiting,
        }


def read_position(values: Mapping[str, Any], accumulate: int) -> Position:
    """The position in the state.json of a checkpoint. Older ones have no number: `accumulate` is what was set then."""
    lowest = values.get("lowest", values["best"])
    return Position(
        step=values["step"],
        number=values.get("number", values["step"] * accumulate),
        skipped=list(values.get("skipped", ())),
        best=[(float(loss), step) for loss, step in values.get("ranking", ())],
        lowest=math.inf if lowest is None else float(lowest),
        waiting=values.get("waiting", 0),
    )


def position_fault(values: Mapping[str, Any]) -> str:
    """The name of the first value that `read_position` cannot use; "" if there is none."""
    if "best" not in values or not _is_loss(values["best"]):
        return "best"
    checks = {
        "number": lambda value: type(value) is int,
        "skipped": lambda value: isinstance(value, list) and all(type(each) is int for each in value),
        "ranking": lambda value: isinstance(value, list) and all(_is_score(each) for each in value),
        "lowest": _is_loss,
        "waiting": lambda value: type(value) is int,
    }
    return next((name for name, fits in checks.items() if name in values and not fits(values[name])), "")


def _is_loss(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _is_score(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and type(value[0]) in (int, float) and type(value[1]) is int

"""Score columns of metadata (`aesthetic`, `punsafe`, `watermark`): they filter pictures and weigh their loss."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from gouache.data.dataset import DataSet
from gouache.data.listing import some
from gouache.data.record import Record
from gouache.errors import RequestError, printable
from gouache.wording import plural

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "=": operator.eq,
}  # fmt: skip
_NUMBER = r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_FILTER = re.compile(rf"\s*([^<>=]+?)\s*(<=|>=|<|>|=)\s*({_NUMBER})\s*")
_WEIGHT = re.compile(rf"\s*(1\s*-\s*)?([^^]+?)\s*(?:\^\s*({_NUMBER}))?\s*")


def select(dataset: DataSet, conditions: Sequence[str]) -> DataSet:
    """The pictures for which all `conditions` hold: "punsafe<0.1", "aesthetic>=5". Others are noted.

    A picture without the score is left out. Raises RequestError for what is not a condition, for a score that no
    picture has, and if no picture is left.
    """
    records, notes = list(dataset.records), list(dataset.notes)
    for text in conditions:
        match = _FILTER.fullmatch(text)
        if match is None:
            raise RequestError("filter", f"{printable(text)!r} is not a condition; expected one like 'aesthetic>=5'")
        column, limit, holds = _column("filter", dataset, match[1]), float(match[3]), _COMPARISONS[match[2]]
        kept = [each for each in records if column in each.scores and holds(each.scores[column], limit)]
        without = sum(column not in each.scores for each in records)
        missing = f", {without} of them without this score" if without else ""
        left = len(records) - len(kept)
        notes.append(f"{printable(text)}: {left} of {plural(len(records), 'picture')} left out{missing}")
        records = kept
    if not records:
        raise RequestError("filter", f"no picture is left with {printable(', '.join(conditions))}")
    return replace(dataset, records=records, notes=notes)


def weigh(dataset: DataSet, by: str) -> DataSet:
    """The same pictures with weights in proportion to a score: "aesthetic", "1-punsafe", "aesthetic^2".

    The mean of the weights stays what it is, and so does the meaning of the learning rate. A picture without the score
    keeps its weight. Raises RequestError for another text, a score that no picture has, or a weight below 0.
    """
    match = _WEIGHT.fullmatch(by)
    if match is None:
        raise RequestError("weigh", f"{printable(by)!r} is not a score; expected one like 'aesthetic' or '1-punsafe'")
    column, power = _column("weigh", dataset, match[2]), float(match[3] or 1)
    factors = {row: _factor(each, column, bool(match[1]), power) for row, each in enumerate(dataset.records)}
    present = [factor for factor in factors.values() if factor is not None]
    mean = sum(present) / len(present)
    if not 0 < mean < float("inf"):
        raise RequestError("weigh", f"{printable(by)}: all weights are 0 or one is infinite")
    records = [
        each if (factor := factors[row]) is None else replace(each, weight=each.weight * factor / mean)
        for row, each in enumerate(dataset.records)
    ]
    low, high = min(present) / mean, max(present) / mean
    note = f"weights by {printable(by)}: {low:.2f} to {high:.2f}"
    if without := len(records) - len(present):
        note += f"; {plural(without, 'picture')} without this score"
    return replace(dataset, records=records, notes=[*dataset.notes, note])


def _factor(record: Record, column: str, from_one: bool, power: float) -> float | None:
    if column not in record.scores:
        return None
    score = 1 - record.scores[column] if from_one else record.scores[column]
    if score < 0 or (score == 0 and power < 0):
        raise RequestError("weigh", f"{printable(record.name)} has {printable(column)} {score:g}; expected at least 0")
    try:
        return score**power
    except OverflowError:
        return float("inf")


def _column(setting: str, dataset: DataSet, name: str) -> str:
    """The score called `name`, in small or capital letters."""
    columns = sorted({column for record in dataset.records for column in record.scores})
    found = [column for column in columns if column == name] or [
        column for column in columns if column.lower() == name.lower()
    ]
    if not found:
        have = f"their scores are {some(columns, 20)}" if columns else "they have no scores"
        raise RequestError(setting, f"no picture has a score {printable(name)!r}; {have}")
    return found[0]

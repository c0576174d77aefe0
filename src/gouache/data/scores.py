"""Score columns of metadata (`aesthetic`, `punsafe`, `watermark`): they filter pictures and weigh their loss."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gouache.data.dataset import DataSet
from gouache.data.listing import some
from gouache.data.record import Record
from gouache.data.shard_records import ShardRecords
from gouache.errors import RequestError, printable
from gouache.wording import plural

_COMPARISONS: dict[str, Callable[[Any, float], Any]] = {
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
    records, notes = dataset.records, list(dataset.notes)
    for text in conditions:
        match = _FILTER.fullmatch(text)
        if match is None:
            raise RequestError("filter", f"{printable(text)!r} is not a condition; expected one like 'aesthetic>=5'")
        column, limit, holds = _column("filter", dataset, match[1]), float(match[3]), _COMPARISONS[match[2]]
        values = _values(records, column)
        kept = np.flatnonzero(holds(values, limit))  # not for NaN
        without = int(np.isnan(values).sum())
        missing = f", {without} of them without this score" if without else ""
        left = len(records) - len(kept)
        notes.append(f"{printable(text)}: {left} of {plural(len(records), 'picture')} left out{missing}")
        records = records.chosen(kept) if isinstance(records, ShardRecords) else [records[row] for row in kept.tolist()]
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
    scores = _values(dataset.records, column).tolist()
    factors = [_factor(dataset, row, score, column, bool(match[1]), power) for row, score in enumerate(scores)]
    present = [factor for factor in factors if factor is not None]
    mean = sum(present) / len(present)
    if not 0 < mean < float("inf"):
        raise RequestError("weigh", f"{printable(by)}: all weights are 0 or one is infinite")
    if isinstance(dataset.records, ShardRecords):
        records = dataset.records.weighted([1.0 if factor is None else factor / mean for factor in factors])
    else:
        records = [
            each if (factor := factors[row]) is None else replace(each, weight=each.weight * factor / mean)
            for row, each in enumerate(dataset.records)
        ]
    low, high = min(present) / mean, max(present) / mean
    note = f"weights by {printable(by)}: {low:.2f} to {high:.2f}"
    if without := len(records) - len(present):
        note += f"; {plural(without, 'picture')} without this score"
    return replace(dataset, records=records, notes=[*dataset.notes, note])


def _values(records: Sequence[Record], column: str) -> np.ndarray:
    """(N,): a score of each record, NaN where there is none."""
    if isinstance(records, ShardRecords):
        return records.scores(column)
    return np.array([each.scores.get(column, np.nan) for each in records], float)


def _factor(dataset: DataSet, row: int, score: float, column: str, from_one: bool, power: float) -> float | None:
    if score != score:
        return None
    score = 1 - score if from_one else score
    if score < 0 or (score == 0 and power < 0):
        name = printable(dataset.records[row].name)
        raise RequestError("weigh", f"{name} has {printable(column)} {score:g}; expected at least 0")
    try:
        return score**power
    except OverflowError:
        return float("inf")


def _column(setting: str, dataset: DataSet, name: str) -> str:
    """The score called `name`, in small or capital letters."""
    records = dataset.records
    columns = (
        records.columns
        if isinstance(records, ShardRecords)
        else sorted({column for record in records for column in record.scores})
    )
    found = [column for column in columns if column == name] or [
        column for column in columns if column.lower() == name.lower()
    ]
    if not found:
        have = f"their scores are {some(columns, 20)}" if columns else "they have no scores"
        raise RequestError(setting, f"no picture has a score {printable(name)!r}; {have}")
    return found[0]

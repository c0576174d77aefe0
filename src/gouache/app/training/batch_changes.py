"""Batch sizes of a run that was resumed with another one: an epoch that has begun is finished with the new size.

The size of a batch is `train.batch` times the number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gouache.app.training.folder import RunFolder
from gouache.training import state as checkpoint
from gouache.training.position import read_position
from gouache.training.run_settings import RunSettings
from gouache.training.snapshot import PROCESSES, fault

_BATCH, _ACCUMULATE = "settings.batch", "settings.accumulate"


def batch_changes(
    folder: RunFolder, settings: RunSettings, processes: int = 1
) -> tuple[int, tuple[tuple[int, int], ...]]:
    """(the first batch size, then (number of a batch, size from it on)): see `training.batches.Options`.

    Those that the checkpoint which the run resumes from records, and that of `settings` in `processes` if it differs.
    Raises TrainingError if all checkpoints are damaged.
    """
    state, batch = folder.state(), settings.train.batch * processes
    if _factors(state) or _saved(state, 0) != batch:  # else older checkpoints have no other size either
        newest = checkpoint.newest(folder.path, fault=fault)
        state = newest.values if newest is not None else {}
    factors, saved = _factors(state), _saved(state, batch)
    accumulate = state.get("settings", {}).get("accumulate", settings.train.accumulate)
    accumulates = [each for each in state.get("changes", ()) if each["name"] == _ACCUMULATE]
    size = saved
    for each in reversed(factors):
        size = size // each["after"] * each["before"]
    first, changes = size, dict[int, int]()
    for each in factors:
        size = size // each["before"] * each["after"]
        changes[_number(each["step"], accumulates, accumulate)] = size
    if saved != batch:
        changes[read_position(state, accumulate).number] = batch
    sizes = [first, *changes.values()]
    return first, tuple(each for before, each in zip(sizes, changes.items()) if each[1] != before)


def changed_processes(folder: RunFolder, settings: RunSettings, processes: int) -> str:
    """One line for a run that is resumed with another number of processes; "" for others."""
    state, batch = folder.state(), settings.train.batch
    before = state.get("processes", processes)
    size = _saved(state, batch * processes)
    if before == processes:
        return ""
    text = f"{before} processes trained with batches of {size} pictures, {processes} will with {batch * processes}"
    if size == batch * processes or size % processes:
        return text
    return f"{text}; to keep {size}: --set train.batch={size // processes}"


def _factors(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The recorded changes of the batch size and of the number of processes."""
    return [each for each in state.get("changes", ()) if each["name"] in (_BATCH, PROCESSES)]


def _saved(state: Mapping[str, Any], usual: int) -> int:
    """The batch size of a checkpoint, over all processes."""
    batch = state.get("settings", {}).get("batch")
    return usual if batch is None else batch * state.get("processes", 1)


def _number(step: int, changes: Sequence[Mapping[str, Any]], last: int) -> int:
    """The number of the first batch of `step`; `changes` are those of the batches per step, `last` is the newest."""
    number, since = 0, 0
    for change in changes:
        if change["step"] < step:
            number += (change["step"] - since) * change["before"]
            since = change["step"]
    now = next((change["before"] for change in changes if change["step"] >= step), last)
    return number + (step - since) * now

"""Batch sizes of a run that was resumed with another one: an epoch that has begun is finished with the new size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gouache.app.training.folder import RunFolder
from gouache.training import state as checkpoint
from gouache.training.position import read_position
from gouache.training.run_settings import RunSettings
from gouache.training.snapshot import fault


def batch_changes(folder: RunFolder, settings: RunSettings) -> tuple[int, tuple[tuple[int, int], ...]]:
    """(the first batch size, then (number of a batch, size from it on)): see `training.batches.Options`.

    Those that the checkpoint which the run resumes from records, and that of `settings` if it differs. Raises
    TrainingError if all checkpoints are damaged.
    """
    state, batch = folder.state(), settings.train.batch
    if _sizes(state) or _saved(state, 0) != batch:  # else older checkpoints have no other size either
        newest = checkpoint.newest(folder.path, fault=fault)
        state = newest.values if newest is not None else {}
    recorded = [each for each in state.get("changes", ()) if each["name"] in ("settings.batch", "settings.accumulate")]
    sizes, saved = _sizes(state), _saved(state, batch)
    first = sizes[0]["before"] if sizes else saved
    accumulate = state.get("settings", {}).get("accumulate", settings.train.accumulate)
    accumulates = [each for each in recorded if each["name"] == "settings.accumulate"]
    changes = [(_number(each["step"], accumulates, accumulate), each["after"]) for each in sizes]
    if saved != batch:
        changes.append((read_position(state, accumulate).number, batch))
    return first, tuple(changes)


def _sizes(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The recorded changes of the batch size."""
    return [each for each in state.get("changes", ()) if each["name"] == "settings.batch"]


def _saved(state: Mapping[str, Any], usual: int) -> int:
    return state.get("settings", {}).get("batch", usual)


def _number(step: int, changes: Sequence[Mapping[str, Any]], last: int) -> int:
    """The number of the first batch of `step`; `changes` are those of the batches per step, `last` is the newest."""
    number, since = 0, 0
    for change in changes:
        if change["step"] < step:
            number += (change["step"] - since) * change["before"]
            since = change["step"]
    now = next((change["before"] for change in changes if change["step"] >= step), last)
    return number + (step - since) * now

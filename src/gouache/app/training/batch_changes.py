"""Batch sizes of a run that was resumed with another one: an epoch that has begun is finished with the new size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gouache.app.training.folder import RunFolder
from gouache.training.run_settings import RunSettings


def batch_changes(folder: RunFolder, settings: RunSettings) -> tuple[int, tuple[tuple[int, int], ...]]:
    """(the first batch size, then (number of a batch, size from it on)): see `training.batches.Options`.

    Those that the newest checkpoint records, and that of `settings` if it differs from the checkpoint's.
    """
    state, batch = folder.state(), settings.train.batch
    recorded = [each for each in state.get("changes", ()) if each["name"] in ("settings.batch", "settings.accumulate")]
    sizes = [each for each in recorded if each["name"] == "settings.batch"]
    saved = state.get("settings", {}).get("batch", batch)
    first = sizes[0]["before"] if sizes else saved
    accumulate = state.get("settings", {}).get("accumulate", settings.train.accumulate)
    accumulates = [each for each in recorded if each["name"] == "settings.accumulate"]
    changes = [(_number(each["step"], accumulates, accumulate), each["after"]) for each in sizes]
    if saved != batch:
        changes.append((state["number"], batch))
    return first, tuple(changes)


def _number(step: int, changes: Sequence[Mapping[str, Any]], last: int) -> int:
    """The number of the first batch of `step`; `changes` are those of the batches per step, `last` is the newest."""
    number, since = 0, 0
    for change in changes:
        if change["step"] < step:
            number += (change["step"] - since) * change["before"]
            since = change["step"]
    now = next((change["before"] for change in changes if change["step"] >= step), last)
    return number + (step - since) * now

"""The batch sizes of a run that was resumed with others, from its newest checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gouache.app.training.batch_changes import batch_changes
from gouache.app.training.folder import RunFolder
from gouache.training.run_settings import RunSettings, checked


def settings(batch: int) -> RunSettings:
    return checked({"train": {"steps": 9, "batch": batch, "learning_rate": 1e-4, "accumulate": 2}})


def written(folder: Path, **values: Any) -> RunFolder:
    path = folder / "step-00000005"
    path.mkdir()
    (path / "state.json").write_text(json.dumps(values))
    return RunFolder(folder)


def change(step: int, name: str, before: int, after: int) -> dict[str, Any]:
    return {"step": step, "name": f"settings.{name}", "before": before, "after": after}


def test_a_new_run_has_one_size(tmp_path: Path):
    assert batch_changes(RunFolder(tmp_path), settings(4)) == (4, ())


def test_an_unchanged_run_has_one_size(tmp_path: Path):
    folder = written(tmp_path, number=10, changes=[], settings={"batch": 4, "accumulate": 2})
    assert batch_changes(folder, settings(4)) == (4, ())


def test_steps_of_changes_become_numbers_of_batches(tmp_path: Path):
    """Three steps of one batch, then two of two: the batch size that changed at step 4 did so at batch 3 + 2."""
    changes = [change(3, "accumulate", 1, 2), change(4, "batch", 4, 2), change(4, "learning_rate", 1, 2)]
    folder = written(tmp_path, number=7, changes=changes, settings={"batch": 2, "accumulate": 2})
    assert batch_changes(folder, settings(2)) == (4, ((5, 2),))
    assert batch_changes(folder, settings(8)) == (4, ((5, 2), (7, 8)))

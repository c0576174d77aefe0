"""The batch sizes of a run that was resumed with others, from its newest checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gouache.app.training.batch_changes import batch_changes
from gouache.app.training.folder import RunFolder
from gouache.training.run_settings import RunSettings, checked
from gouache.training.state import State, save


def settings(batch: int) -> RunSettings:
    return checked({"train": {"steps": 9, "batch": batch, "learning_rate": 1e-4, "accumulate": 2}})


def written(folder: Path, step: int = 5, **values: Any) -> RunFolder:
    tensors = {"weights": {"a": torch.zeros(1)}, "optimizer": {"a.step": torch.zeros(1)}}
    save(folder, State(tensors, {"step": step, "best": None, "ema_updates": 0, **values}), keep=9)
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


@pytest.mark.parametrize("damaged", ["weights.safetensors", "state.json", "manifest.json"])
def test_the_changes_are_those_of_the_newest_undamaged_checkpoint(damaged: str, tmp_path: Path):
    """A run of batches of 4 went on with 2 from step 5 on; its last checkpoint, of step 7, is damaged."""
    usual = {"batch": 4, "accumulate": 2}
    written(tmp_path, number=10, changes=[], settings=usual)
    folder = written(tmp_path, 7, number=14, changes=[change(5, "batch", 4, 2)], settings={**usual, "batch": 2})
    assert batch_changes(folder, settings(2)) == (4, ((10, 2),))
    assert batch_changes(folder, settings(8)) == (4, ((10, 2), (14, 8)))
    (tmp_path / "step-00000007" / damaged).write_bytes(b"{}")
    assert batch_changes(folder, settings(8)) == (4, ((10, 8),))
    assert batch_changes(folder, settings(4)) == (4, ())


def test_a_checkpoint_without_a_number_counts_by_its_batches_per_step(tmp_path: Path):
    folder = written(tmp_path, changes=[], settings={"batch": 4, "accumulate": 3})
    assert batch_changes(folder, settings(2)) == (4, ((15, 2),))

"""A run on a full disk stops in one line; its newest checkpoint is whole, and the run goes on once there is space."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gouache.app.settings import Settings
from gouache.errors import TrainingError
from gouache.files.write import AtomicOutput
from gouache.training import state

from .short_runs import Narrows, make_pictures, run, small_settings


def fill_before_save(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """No space is left once there is a checkpoint."""
    usage = shutil.disk_usage

    def used(path: Any) -> Any:
        whole = usage(path)
        return whole._replace(free=1_000_000) if state.checkpoints(folder) else whole

    patch.setattr(shutil, "disk_usage", used)


def fill_within_save(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """The second checkpoint is the last straw, in the middle of a file."""
    write = AtomicOutput.write
    written = 0

    def limited(self: AtomicOutput, data: Any) -> int:
        nonlocal written
        if list(folder.glob("step-00000004.part")):
            written += len(data)
            if written > 20_000:
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    patch.setattr(AtomicOutput, "write", limited)


@pytest.mark.parametrize("fill", [fill_before_save, fill_within_save])
def test_a_run_on_a_full_disk_stops_in_one_line_with_its_newest_checkpoint_whole(
    fill: Any, narrow: Narrows, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pictures, folder = make_pictures(tmp_path / "pictures"), tmp_path / "run"
    chosen = small_settings(narrow("sd1").file, pictures, tmp_path / "out.safetensors")
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match=r"full|are free") as caught:
        fill(patch, folder)
        run(chosen, folder, settings)

    assert "\n" not in str(caught.value) and "again" in str(caught.value)
    assert [path.name for path in folder.glob("step-*")] == ["step-00000002"]
    assert state.read(folder / "step-00000002").step == 2
    assert not [path for path in folder.rglob("*") if path.name.endswith((".part", ".tmp"))]
    assert not (tmp_path / "out.safetensors").exists()

    run(chosen, folder, settings)
    run(chosen, tmp_path / "whole", settings)
    ends = [load_file(each / "step-00000004" / "weights.safetensors") for each in (folder, tmp_path / "whole")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_a_disk_without_space_for_one_checkpoint_is_refused_before_the_first_step(
    narrow: Narrows, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pictures, steps = make_pictures(tmp_path / "pictures"), list[int]()
    chosen = small_settings(narrow("sd1").file, pictures, tmp_path / "out.safetensors", samples={"every": 0})
    usage = shutil.disk_usage(tmp_path)._replace(free=15_000_000)
    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(TrainingError, match="a checkpoint needs"):
        run(chosen, tmp_path / "run", settings, on_progress=lambda progress: steps.append(progress.step))
    assert not steps

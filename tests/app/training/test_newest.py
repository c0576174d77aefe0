"""Painting with the newest weights of a run, by the name of its folder, while it trains and after damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gouache
from gouache.app import names
from gouache.app.settings import Settings
from gouache.app.training import export
from gouache.app.training.newest import newest_file
from gouache.errors import FileError, GouacheError
from gouache.training import state
from tests.app.training.short_runs import run, settings_of
from tests.pipelines import Narrow

Narrows = Callable[[str], Narrow]


def painted(model: Path, user: Settings, **options: object) -> torch.Tensor:
    loaded = gouache.load(model, device="cpu", dtype="fp32", settings=user)
    return next(loaded.paint("zorb", steps=2, seed=1, size=(64, 64), **options)).latent


@pytest.mark.skipif("sys.platform == 'win32'", reason="no flock")
def test_an_adapter_run_is_a_lora_while_it_trains(narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path):
    model, folder = narrow("sd1").file, tmp_path / "style"
    chosen = settings_of(
        model, pictures, tmp_path / "out.safetensors", adapter={"rank": 2}, train={"save_steps": 2, "keep": 5}
    )
    run(chosen, folder, settings, stop_after=2)
    first = newest_file(folder, settings)
    assert first.name == "style-step-00000002.safetensors"
    written = first.stat().st_mtime_ns
    assert newest_file(folder, settings) == first and first.stat().st_mtime_ns == written

    run(chosen, folder, settings)
    with state.locked(folder):
        newer = painted(model, settings, lora=[str(folder)])
    assert [each.name for each in (folder / "newest").iterdir()] == ["style-step-00000004.safetensors"]
    assert torch.equal(newer, painted(model, settings, lora=[str(tmp_path / "out.safetensors")]))

    with (folder / "step-00000004" / "weights.safetensors").open("r+b") as file:
        file.truncate(100)
    (folder / "newest" / "style-step-00000004.safetensors").unlink()
    assert names.resolve(str(folder), settings).name == "style-step-00000002.safetensors"
    assert not torch.equal(newer, painted(model, settings, lora=[str(folder)]))


def test_a_fine_tuning_run_is_a_model(narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path):
    chosen = settings_of(
        narrow("sd1").file, pictures, tmp_path / "out.safetensors", mode="finetune", adapter={"form": "none"},
        train={"steps": 2},
    )  # fmt: skip
    run(chosen, tmp_path / "run", settings)
    assert torch.equal(painted(tmp_path / "run", settings), painted(tmp_path / "out.safetensors", settings))


@pytest.mark.full
def test_a_checkpoint_of_the_same_step_that_was_trained_again_is_exported_again(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    chosen = settings_of(narrow("sd1").file, pictures, tmp_path / "out.safetensors", adapter={"rank": 2})
    run(chosen, tmp_path / "run", settings)
    before = newest_file(tmp_path / "run", settings).read_bytes()
    for path in (tmp_path / "run").glob("step-*"):
        path.rename(tmp_path / path.name)
    changed = chosen.model_copy(update={"train": chosen.train.model_copy(update={"learning_rate": 0.1})})
    run(changed, tmp_path / "run", settings)
    assert newest_file(tmp_path / "run", settings).read_bytes() != before


def test_a_run_without_checkpoint_is_one_line(tmp_path: Path, settings: Settings):
    (tmp_path / "settings.toml").touch()
    (tmp_path / "lock").touch()
    with pytest.raises(GouacheError, match="has no checkpoint yet"):
        names.resolve(str(tmp_path), settings)


def test_two_that_ask_at_once_get_the_same_file_and_a_folder_that_cannot_be_written_is_one_line(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    chosen = settings_of(narrow("sd1").file, pictures, tmp_path / "out.safetensors", adapter={"rank": 2})
    run(chosen, tmp_path / "run", settings, stop_after=1)
    alone, meanwhile, export_one = newest_file(tmp_path / "run", settings).read_bytes(), [], export.export

    def slow(*values: Any, **options: Any) -> int:
        if not meanwhile:  # another asks after this one has begun
            meanwhile.append(Path())
            meanwhile.append(newest_file(tmp_path / "run", settings))
        return export_one(*values, **options)

    newest_file(tmp_path / "run", settings).unlink()
    monkeypatch.setattr(export, "export", slow)
    file = newest_file(tmp_path / "run", settings)
    assert file == meanwhile[1] and file.read_bytes() == alone
    assert list(file.parent.iterdir()) == [file]

    shutil.rmtree(file.parent)
    file.parent.touch()  # no folder can be made, whoever runs the tests
    with pytest.raises(FileError, match="cannot be written to"):
        newest_file(tmp_path / "run", settings)

"""Runs that go on with a checkpoint of PyTorch Lightning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gouache.app.settings import Settings
from gouache.app.training import defaults, foreign
from gouache.app.training.folder import RunFolder
from gouache.errors import GouacheError
from gouache.files.open import open_model
from tests.app.training.short_runs import run, settings_of
from tests.pipelines import Narrow
from tests.training.test_lightning import UNET, written

Narrows = Callable[[str], Narrow]


def test_moments_averages_and_step_are_taken_over(narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path):
    file = tmp_path / "last.ckpt"
    expected = written(narrow("sd1"), file, text=False, family="sd1")
    train = {"steps": 5, "ema_decay": 0.999, "save_steps": 1, "keep": 9, "learning_rate": 1e-4}
    chosen = settings_of(
        file, pictures, tmp_path / "out.safetensors", mode="finetune", adapter={"form": "none"}, train=train,
        model={"resume": True},
    )  # fmt: skip
    notes: list[str] = []
    finished = run(chosen, tmp_path / "run", settings, notes=notes)

    folder = RunFolder(tmp_path / "run")
    assert finished.step == 5 and folder.steps() == [3, 4, 5]
    assert [line["step"] for line in folder.log() if "loss" in line] == [4, 5]
    first = folder.checkpoint(3)
    moments, means, weights = (load_file(first / f"{name}.safetensors") for name in ("optimizer", "ema", "weights"))
    for name, values in expected["moments"].items():
        ours = f"unet.{name.removeprefix(UNET)}"
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(moments[f"{ours}.{key}"], values[key])
        state = expected["content"]["state_dict"]
        assert torch.equal(weights[ours], state[name])
        assert torch.equal(means[ours], state["model_ema." + name.removeprefix("model.").replace(".", "")].float())
    assert any("goes on from step 3 with the moments of" in note for note in notes)
    after = load_file(folder.checkpoint(5) / "optimizer.safetensors")
    assert {float(value) for name, value in after.items() if name.endswith(".step")} == {5.0}


def test_the_command_counts_its_steps_on_from_those_of_the_checkpoint(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    written(narrow("sd1"), tmp_path / "last.ckpt", text=False, family="sd1")
    chosen = defaults.choose(
        "finetune", str(pictures), str(tmp_path / "last.ckpt"), output=None, trigger="", class_word="", steps=20,
        overrides=["resume=true"], settings=settings,
    )  # fmt: skip
    assert (chosen.train.steps, chosen.train.schedule, chosen.train.warmup) == (23, "constant", 0)


def test_a_checkpoint_that_is_only_started_from_says_that_it_could_be_gone_on_with(
    narrow: Narrows, pictures: Path, tmp_path: Path
):
    written(narrow("sd1"), tmp_path / "last.ckpt", text=False, family="sd1")
    file, tables = open_model(tmp_path / "last.ckpt"), {"adapter": {"form": "none"}}
    chosen = settings_of(tmp_path / "last.ckpt", pictures, tmp_path / "out.safetensors", **tables)
    assert foreign.hint(chosen, file) == (
        "last.ckpt is a training checkpoint of step 3; to go on from there: --set resume=true"
    )
    resumed = settings_of(
        tmp_path / "last.ckpt", pictures, tmp_path / "out.safetensors", model={"resume": True}, **tables
    )
    assert foreign.hint(resumed, file) == "" == foreign.hint(chosen, open_model(narrow("sd1").file))


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"adapter": {"form": "lora", "rank": 2}}, "set adapter.form to none"),
        ({"train": {"optimizer": "sgd"}}, "moments of Adam"),
        ({"train": {"steps": 3}}, "set more steps"),
    ],
)
def test_what_cannot_go_on_is_one_line(
    tables: dict[str, dict[str, object]], message: str, narrow: Narrows, pictures: Path, settings: Settings,
    tmp_path: Path,
):  # fmt: skip
    written(narrow("sd1"), tmp_path / "last.ckpt", text=False, family="sd1")
    usual: dict[str, dict[str, object]] = {"adapter": {"form": "none"}, "model": {"resume": True}}
    chosen = settings_of(tmp_path / "last.ckpt", pictures, tmp_path / "out.safetensors", **{**usual, **tables})
    with pytest.raises(GouacheError, match=message):
        run(chosen, tmp_path / "run", settings)


def test_a_model_file_without_training_state_is_one_line(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    chosen = settings_of(
        narrow("sd1").file, pictures, tmp_path / "out.safetensors", mode="finetune", adapter={"form": "none"},
        model={"resume": True},
    )  # fmt: skip
    with pytest.raises(GouacheError, match="not a training checkpoint of PyTorch Lightning"):
        run(chosen, tmp_path / "run", settings)

"""Runs that end early: when, which weights are exported, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gouache.app.settings import Settings
from gouache.app.training import defaults, opening
from gouache.app.training.folder import RunFolder, curve
from gouache.app.training.status import status
from tests.app.training.short_runs import run, settings_of
from tests.pipelines import Narrow

Narrows = Callable[[str], Narrow]
UNET = "model.diffusion_model."


def test_patience_exports_the_best_checkpoint_and_says_so(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    output, folder = tmp_path / "out.safetensors", RunFolder(tmp_path / "run")
    train = {
        "steps": 50, "validate_steps": 1, "patience": 2, "minimum_change": 100.0, "learning_rate": 0.05,
        "ema_decay": 0.0, "keep": 1,
    }  # fmt: skip
    chosen = settings_of(
        narrow("sd1").file, pictures, output, mode="finetune", adapter={"form": "none"}, train=train,
        validation={"pictures": 1},
    )  # fmt: skip
    notes: list[str] = []
    finished = run(chosen, folder.path, settings, notes=notes)

    steps, losses = curve(folder.log(), "validation loss")
    best = steps[losses.index(min(losses))]
    assert steps == [1, 2, 3] and finished.step == 3  # the first loss is one, then two that are not 100 lower
    assert best < 3 and finished.exported == best
    assert any("stopped early at step 3" in note and f"step {best}" in note for note in notes)
    assert status(folder).state == "stopped early"
    written = load_file(output)
    of_best = load_file(folder.checkpoint(best) / "weights.safetensors")
    of_last = load_file(folder.checkpoint(3) / "weights.safetensors")
    name = next(key for key in of_best if not torch.equal(of_best[key], of_last[key]) and of_best[key].ndim == 2)
    exported = written[UNET + name.removeprefix("unet.")]
    assert torch.equal(exported, of_best[name].to(exported.dtype))

    notes.clear()
    again = run(chosen, folder.path, settings, notes=notes)
    assert (again.step, again.exported) == (3, best)
    assert any("--set train.patience=0" in note for note in notes)

    notes.clear()
    other = settings_of(
        narrow("sd1").file, pictures, output, mode="finetune", adapter={"form": "none"}, train={**train, "steps": 4},
        validation={"pictures": 1, "timesteps": 3},
    )  # fmt: skip
    assert run(other, folder.path, settings, notes=notes).step == 4  # other losses, which patience counts anew
    assert "goes on after step 3 of 4" in notes


def test_averages_and_last_weights_are_validated_at_each_timestep(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    chosen = settings_of(
        narrow("sd1").file, pictures, tmp_path / "out.safetensors", adapter={"rank": 2}, train={"ema_decay": 0.9},
        validation={"share": 0.4, "timesteps": 2, "probe": 1},
    )  # fmt: skip
    run(chosen, tmp_path / "run", settings)
    line = next(line for line in RunFolder(tmp_path / "run").log() if "validation loss" in line)
    for kind in ("validation", "validation raw"):
        by_timestep = [value for name, value in line.items() if name.startswith(f"{kind} loss at ")]
        assert len(by_timestep) == 2 and line[f"{kind} loss"] == pytest.approx(sum(by_timestep) / 2, rel=1e-5)
        assert f"{kind} training loss" in line
    assert line["validation loss"] != line["validation raw loss"]


def test_a_finished_run_names_the_step_that_was_best(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    train = {"steps": 3, "validate_steps": 1, "learning_rate": 0.05, "ema_decay": 0.0, "schedule": "constant"}
    chosen = settings_of(
        narrow("sd1").file, pictures, tmp_path / "out.safetensors", mode="finetune", adapter={"form": "none"},
        train=train, validation={"pictures": 1},
    )  # fmt: skip
    notes: list[str] = []
    finished = run(chosen, tmp_path / "run", settings, notes=notes)
    steps, losses = curve(RunFolder(tmp_path / "run").log(), "validation loss")
    best = steps[losses.index(min(losses))]
    assert finished.exported == 3 and best < 3
    assert any(f"lowest at step {best}" in note and "--step best" in note for note in notes)
    notes.clear()
    again = run(chosen, tmp_path / "run", settings, notes=notes)
    assert again.path is not None and any("all 3 steps are done" in n and "train.steps=6" in n for n in notes)


@pytest.mark.parametrize(("steps", "interval"), [(20, 10), (300, 30), (4000, 400), (50_000, 1000)])
def test_short_runs_are_validated_too(steps: int, interval: int, narrow: Narrows, pictures: Path, settings: Settings):
    for given in ({"steps": steps, "overrides": []}, {"steps": None, "overrides": [f"train.steps={steps}"]}):
        chosen = defaults.choose(
            "lora", str(pictures), str(narrow("sd1").file), output=None, trigger="", class_word="", settings=settings,
            **given,
        )  # fmt: skip
        assert (chosen.train.steps, chosen.train.validate_steps) == (steps, interval)


def test_a_refused_change_leaves_the_settings_of_the_run(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    chosen = settings_of(narrow("sd1").file, pictures, tmp_path / "out.safetensors", adapter={"rank": 2})
    run(chosen, tmp_path / "run", settings, stop_after=1)
    file = tmp_path / "run" / "settings.toml"
    before = file.read_text()
    changed, folder = opening.opened(tmp_path / "run", ["rank=4"])
    with pytest.raises(Exception, match=r"was trained with .*rank 2 \(now 4\)"):
        run(changed, folder.path, settings)
    assert file.read_text() == before
    again, folder = opening.opened(tmp_path / "run", [])
    assert run(again, folder.path, settings).step == 4  # what was read from the file is what was begun with

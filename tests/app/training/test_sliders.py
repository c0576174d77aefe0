"""Runs without pictures: from prompts to a file that works at both signs of its strength; resume, refusals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import gouache
from gouache.app.settings import Settings
from gouache.app.training import defaults, estimate, export
from gouache.app.training.folder import RunFolder
from gouache.cli import main
from gouache.errors import GouacheError
from gouache.generate.picture import read_recipe
from gouache.training.run_settings import RunSettings, checked, template
from tests.app.training.short_runs import run
from tests.pipelines import Narrow

Narrows = Callable[[str], Narrow]
SLIDER = {"target": "a cat", "positive": "a red cat", "opposite": "a blue cat", "size": 64, "denoising_steps": 3,
          "strengths": [2.0]}  # fmt: skip
YAML = """
- target: a cat
  positive: a red cat
  guidance_scale: 2.0
  resolution: 64
  dynamic_resolution: true
- {target: a dog, action: enhance, resolution: [64, 128], dynamic_crops: true}
"""


def settings_of(model: Path, output: Path, slider: dict[str, Any] | None = None, **tables: Any) -> RunSettings:
    usual: dict[str, Any] = {
        "mode": "slider",
        "output": str(output),
        "device": "cpu",
        "model": {"name": str(model)},
        "slider": SLIDER if slider is None else slider,
        "adapter": {"rank": 2},
        "train": {
            "steps": 4,
            "batch": 1,
            "learning_rate": 1e-2,
            "warmup": 0,
            "log_steps": 1,
            "validate_steps": 2,
            "ema_decay": 0.0,
        },
        "samples": {"every": 1000, "steps": 2},
        "memory": {"dtype": "fp32", "autocast": "no"},
        "validation": {"probe": 2, "timesteps": 2},
    }
    for name, value in tables.items():
        usual[name] = {**usual.get(name, {}), **value} if isinstance(value, dict) else value
    return checked(usual)


def prompts(folder: Path, text: str = YAML, name: str = "prompts.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def painted(model: gouache.Model, **options: Any) -> torch.Tensor:
    return next(model.paint("a cat", steps=2, seed=1, size=(64, 64), **options)).latent


@pytest.mark.parametrize("family", ["sd1", *(pytest.param(each, marks=pytest.mark.full) for each in ("sdxl", "sd2"))])
def test_a_stopped_run_ends_alike_and_the_file_acts_in_both_directions(
    family: str, narrow: Narrows, settings: Settings, tmp_path: Path
):
    file = prompts(tmp_path) if family == "sdxl" else None
    slider = None if file is None else {"file": str(file), "denoising_steps": 3, "strengths": [2.0]}
    model, output = narrow(family).file, tmp_path / "cat.safetensors"
    chosen = settings_of(
        model, output, slider, adapter={"rank": 2, "dropout": 0.2}, train={"steps": 2, "validate_steps": 1}
    )

    whole = run(chosen, tmp_path / "whole", settings)
    first = hashlib.sha256(output.read_bytes()).hexdigest()
    assert (run(chosen, tmp_path / "parts", settings, stop_after=1).path) is None
    resumed = run(chosen, tmp_path / "parts", settings)

    assert (whole.path, whole.step, resumed.step) == (output, 2, 2) and whole.command.endswith(":2")
    assert hashlib.sha256(output.read_bytes()).hexdigest() == first
    for name in ("weights", "optimizer"):
        parts = [load_file(tmp_path / each / "step-00000002" / f"{name}.safetensors") for each in ("whole", "parts")]
        assert all(torch.equal(parts[0][key], parts[1][key]) for key in parts[0])
    loaded = gouache.load(model, device="cpu", dtype="fp32", settings=settings)
    base, plus, minus = (painted(loaded, **({"lora": [f"{output}:{s}"]} if s else {})) for s in (0, 1, -1))
    assert not torch.equal(plus, base) and not torch.equal(minus, base) and not torch.equal(plus, minus)
    logged = [line["validation loss"] for line in RunFolder(tmp_path / "whole").log() if "validation loss" in line]
    assert len(logged) == 2 and logged[0] != logged[1]


@pytest.mark.full
def test_gradient_checkpointing_changes_no_weight(narrow: Narrows, settings: Settings, tmp_path: Path):
    """The blocks are evaluated again at the strength of the batch, whose sign alternates."""
    found = []
    for checkpointing in (False, True):
        memory = {"dtype": "fp32", "autocast": "no", "checkpointing": checkpointing}
        folder = tmp_path / str(checkpointing)
        run(settings_of(narrow("sd1").file, tmp_path / "cat.safetensors", memory=memory), folder, settings)
        found.append(load_file(folder / "step-00000004" / "weights.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_samples_are_painted_at_each_strength(narrow: Narrows, settings: Settings, tmp_path: Path):
    slider = SLIDER | {"strengths": [-1.0, 0.0, 1.0]}
    model, output = narrow("sd1").file, tmp_path / "cat.safetensors"
    chosen = settings_of(model, output, slider, samples={"every": 1, "steps": 2, "prompts": ["a cat", "a dog"]},
                         train={"steps": 1})  # fmt: skip
    run(chosen, tmp_path / "run", settings)
    folder = tmp_path / "run" / "samples"
    names = [f"step-{step:08d}-{number:02d}.png" for step in (0, 1) for number in range(6)]
    assert sorted(path.name for path in folder.glob("step-*.png")) == names
    pictures = {name: np.asarray(read_recipe(folder / name)[1]) for name in names}
    seeds = [read_recipe(folder / name)[0]["request"]["seed"] for name in names[:6]]
    assert seeds == [1, 1, 1, 2, 2, 2]
    before, after = [pictures[name] for name in names[:3]], [pictures[name] for name in names[6:9]]
    assert all(np.array_equal(before[1], each) for each in (before[0], before[2], after[1]))  # untrained, or at 0
    assert not np.array_equal(after[0], after[1]) and not np.array_equal(after[0], after[2])


@pytest.mark.parametrize(
    "lineage", ["plain", *(pytest.param(each, marks=pytest.mark.full) for each in ("none", "hashed"))]
)
def test_the_file_says_of_its_prompts_what_lineage_allows(
    lineage: str, narrow: Narrows, settings: Settings, tmp_path: Path
):
    chosen = settings_of(
        narrow("sd1").file, tmp_path / "cat.safetensors", {"file": str(prompts(tmp_path)), "denoising_steps": 2},
        lineage=lineage, train={"steps": 1},
    )  # fmt: skip
    run(chosen, tmp_path / "run", settings)
    export.export(RunFolder(tmp_path / "run"), tmp_path / "again.safetensors", settings)
    for name in ("cat", "again"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as opened:
            found = opened.metadata()
        assert (found.get("ss_leco_prompt_count") == "2") == (lineage != "none")
        shown = json.loads(found.get("ss_leco_preview", "[]"))
        assert [each["target"] for each in shown] == (["a cat", "a dog"] if lineage == "plain" else [])
        assert lineage == "plain" or not any("a cat" in value for value in found.values())


@pytest.mark.full
def test_dry_run_predicts_without_writing(narrow: Narrows, settings: Settings, tmp_path: Path):
    chosen = settings_of(narrow("sd1").file, tmp_path / "cat.safetensors")
    found = estimate.estimate(chosen, RunFolder(tmp_path / "run"), settings, on_note=lambda line: None)
    assert found.fits and found.step_seconds > 0 and not (tmp_path / "run").exists()
    assert next(found.lines()) == "4 concepts, 4 steps, 1.0 epochs"
    assert found.cache_bytes == 0


@pytest.mark.full
def test_the_memory_of_a_step_grows_with_batch_and_size(
    narrow: Narrows, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(estimate, "available", lambda device: 1)  # nothing is run
    monkeypatch.setattr("gouache.app.training.memory_use._own_memory", lambda: 0)
    peaks = []
    for batch in (1, 4):
        chosen = settings_of(narrow("sd1").file, tmp_path / "cat.safetensors", train={"batch": batch})
        found = estimate.estimate(chosen, RunFolder(tmp_path / "run"), settings, on_note=lambda line: None)
        peaks.append(found.memory_bytes)
    assert peaks[0] < peaks[1] and "a smaller slider.size" in found.advice[0]


def test_chosen_settings_are_a_file_that_reads_back(settings: Settings, tmp_path: Path):
    def choose(data: str, *overrides: str) -> RunSettings:
        return defaults.choose(
            "slider", data, "mini", output=None, trigger="", class_word="", steps=None, overrides=list(overrides),
            settings=settings,
        )  # fmt: skip

    chosen = choose(str(prompts(tmp_path)))
    assert (chosen.output, chosen.adapter.rank, chosen.train.steps) == ("prompts.safetensors", 8, 500)
    assert chosen.slider.strengths == [0, 1]  # all of its strengths are positive
    assert choose("", "positive=old", "opposite=young").slider.strengths == [-2, 0, 2]
    assert choose("", "erase=van gogh").output == "van-gogh.safetensors"
    kohya = choose("", f"prompts_file={tmp_path}/prompts.yaml", "max_denoising_steps=30", "network_dim=4")
    assert (kohya.slider.denoising_steps, kohya.adapter.rank, kohya.adapter.alpha) == (30, 4, 1)
    assert choose("", "erase=cat", "form=ia3").adapter.form == "ia3"
    (tmp_path / "s.toml").write_text(template(chosen))
    from gouache.training.run_settings import read

    assert read(tmp_path / "s.toml") == chosen
    with pytest.raises(GouacheError, match="epochs: is for runs with pictures"):
        choose("", "erase=cat", "epochs=3")


def test_the_command_line_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["gouache", "train", "slider", "-o", str(tmp_path / "s.safetensors")])
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"slider": {}}, "slider.file: is missing; expected a file of prompts, or use"),
        ({"slider": {"file": "none.yaml"}}, "none.yaml: does not exist"),
        ({"slider": {"file": "x.yaml", "target": "a cat"}}, "slider.target: has no effect beside a file"),
        ({"slider": {"erase": "a", "positive": "b"}}, "slider.positive: is part of a slider"),
        ({"slider": SLIDER | {"size": 65}}, "slider.size: input should be a multiple of 8"),
        ({"slider": SLIDER | {"denoising_steps": 2000}}, "denoising_steps: is 2000; expected 2 to 1000"),
        ({"adapter": {"form": "none", "rank": 16}}, "adapter.form: is none: a slider is an adapter"),
        ({"data": {"trigger": "zorb"}}, "data.trigger: has no effect on the mode slider"),
        ({"parts": {"text_encoder": True}}, "parts.text_encoder: has no effect on the mode slider"),
        ({"loss": {"noise_offset": 0.1}}, "loss.noise_offset: has no effect on the mode slider"),
        ({"embedding": {"vectors": 2}}, "embedding.vectors: has no effect on the mode slider"),
        ({"mode": "lora"}, "slider.target: has no effect on the mode lora"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(
    tables: dict[str, Any], message: str, narrow: Narrows, settings: Settings, tmp_path: Path
):
    tables = dict(tables)
    slider = tables.pop("slider", None)
    with pytest.raises(GouacheError) as caught:
        run(settings_of(narrow("sd1").file, tmp_path / "s.safetensors", slider, **tables), tmp_path / "run", settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_inpainting_model_is_refused(narrow: Narrows, settings: Settings, tmp_path: Path):
    with pytest.raises(GouacheError, match="has 9 input channels"):
        run(settings_of(narrow("sd1-inpainting").file, tmp_path / "s.safetensors"), tmp_path / "run", settings)


@pytest.mark.full
def test_a_slider_of_mini_moves_the_redness_of_its_pictures_monotonically(settings: Settings, tmp_path: Path):
    """`tests/training/test_concept_objective.py` has the short form, with a network that is known exactly."""
    output = tmp_path / "redness.safetensors"
    chosen = defaults.choose(
        "slider", "", "mini", output=output, trigger="", class_word="", steps=40, settings=settings,
        overrides=["target=a cat", "positive=a cat on a red background", "opposite=a cat on a blue background",
                   "slider.size=64", "denoising_steps=10", "samples.every=1000", "validate_steps=1000", "device=cpu",
                   "learning_rate=1e-3"],
    )  # fmt: skip
    run(chosen, tmp_path / "run", settings)
    model = gouache.load("mini", device="cpu", dtype="fp32", settings=settings)
    redness = []
    for strength in (-2, -1, 0, 1, 2):
        pictures = [
            np.asarray(next(model.paint("a cat", steps=8, seed=seed, lora=[f"{output}:{strength}"])).image, np.float64)
            for seed in (1, 2)
        ]
        redness.append(np.mean([(each[..., 0] - each[..., 2]).mean() for each in pictures]))
    assert redness == sorted(redness) and redness[-1] - redness[0] > 100  # of 255

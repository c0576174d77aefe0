"""Runs from a folder of pictures to a file: every mode trains, resumes bit for bit, exports and changes the picture."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gouache
from gouache.app.settings import Settings
from gouache.app.training.folder import RunFolder
from gouache.errors import GouacheError
from gouache.training.run_settings import RunSettings
from tests.app.training.short_runs import run, settings_of
from tests.pipelines import Narrow

Narrows = Callable[[str], Narrow]
FAMILIES = ("sd1", "sd2", "sdxl")
FORMS = ("lora", "locon", "loha", "lokr", "dora", "ia3", "oft")


MODES: dict[str, dict[str, Any]] = {
    **{form: {"adapter": {"form": form, "rank": 2, "alpha": 2}} for form in FORMS},
    "text encoders": {"adapter": {"rank": 2, "alpha": 2}, "parts": {"text_encoder": True}},
    "dropouts": {"adapter": {"rank": 4, "rank_dropout": 0.3, "module_dropout": 0.3, "dropout": 0.3}},
    "finetune": {"mode": "finetune", "adapter": {"form": "none"}, "train": {"ema_decay": 0.9}},
    "finetune of text": {"mode": "finetune", "adapter": {"form": "none"}, "parts": {"text_encoder": True}},
    "embedding": {"mode": "embedding", "embedding": {"vectors": 2}, "data": {"trigger": "zorb"}},
    "pivotal": {"embedding": {"vectors": 2, "rate": 10.0}, "data": {"trigger": "zorb"}, "adapter": {"rank": 2}},
    "hypernetwork": {"mode": "hypernetwork", "hypernetwork": {"activation": "swish", "dropouts": [0, 0.3, 0]}},
    "class by the model": {"mode": "dreambooth", "loss": {"prior": "model"}, "data": {"class_word": "a cat"}},
}
LONG = {
    ("sd1", "locon"), ("sd1", "loha"), ("sd1", "lokr"), ("sd1", "ia3"), ("sd1", "oft"), ("sd1", "dropouts"),
    ("sd1", "finetune of text"), ("sd1", "dora"), ("sd2", "lora"), ("sdxl", "pivotal"),
    ("sd1-inpainting", "lora"), ("sd1-inpainting", "finetune"),
    ("sd1", "class by the model"), ("sdxl", "lora"), ("sd1", "text encoders"), ("sdxl", "finetune"),
    ("sd2", "text encoders"), ("sdxl", "text encoders"), ("sd2", "pivotal"),
    ("sd2", "embedding"), ("sd1", "pivotal"), ("sd2", "hypernetwork"), ("sd2", "finetune"), ("sdxl", "hypernetwork"),
}  # fmt: skip
CASES = [
    *(("sd1", mode) for mode in MODES),
    *((family, mode) for family in ("sd2", "sdxl") for mode in ("lora", "text encoders", "finetune")),
    *((family, mode) for family in ("sd2", "sdxl") for mode in ("embedding", "pivotal", "hypernetwork")),
    ("sd1-inpainting", "lora"), ("sd1-inpainting", "finetune"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "mode"), [pytest.param(*each, marks=pytest.mark.full) if each in LONG else each for each in CASES]
)
def test_a_run_exports_what_changes_the_picture_and_a_stopped_one_ends_alike(
    family: str, mode: str, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    model, output = narrow(family).file, tmp_path / ("zorb.pt" if mode == "hypernetwork" else "zorb.safetensors")
    chosen = settings_of(model, pictures, output, **MODES[mode])

    whole = run(chosen, tmp_path / "whole", settings)
    first = hashlib.sha256(output.read_bytes()).hexdigest()
    stopped = run(chosen, tmp_path / "parts", settings, stop_after=2)
    assert (stopped.path, stopped.step) == (None, 2)
    resumed = run(chosen, tmp_path / "parts", settings)

    assert (whole.path, whole.step, resumed.step) == (output, 4, 4)
    assert hashlib.sha256(output.read_bytes()).hexdigest() == first
    for name in ("weights", "optimizer"):
        parts = [load_file(tmp_path / each / "step-00000004" / f"{name}.safetensors") for each in ("whole", "parts")]
        assert parts[0].keys() == parts[1].keys()
        assert all(torch.equal(parts[0][key], parts[1][key]) for key in parts[0])
    assert not torch.equal(painted(model, settings), trained_picture(chosen, model, output, settings))


def painted(model: Path, user: Settings, prompt: str = "zorb, red", **options: Any) -> torch.Tensor:
    loaded = gouache.load(model, device="cpu", dtype="fp32", settings=user)
    return next(loaded.paint(prompt, steps=2, seed=1, size=(64, 64), **options)).latent


def trained_picture(chosen: RunSettings, model: Path, output: Path, user: Settings) -> torch.Tensor:
    if chosen.result == "model":
        return painted(output, user)
    option = {"adapter": "lora", "embedding": "embedding", "hypernetwork": "hypernet"}[chosen.result]
    return painted(model, user, **{option: [str(output)]})


def test_fine_tuning_leaves_vae_and_text_encoder_as_they_were(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    model, output = narrow("sd1").file, tmp_path / "tuned.safetensors"
    run(settings_of(model, pictures, output, mode="finetune", adapter={"form": "none"}), tmp_path / "run", settings)

    before, after = load_file(model), load_file(output)
    changed = {name for name in before if name in after and not torch.equal(before[name].float(), after[name].float())}
    assert changed and all(name.startswith("model.diffusion_model.") for name in changed)


def test_growing_to_nine_channels_makes_an_inpainting_model(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    output = tmp_path / "inpainting.safetensors"
    chosen = settings_of(
        narrow("sd1").file, pictures, output, mode="finetune", adapter={"form": "none"}, model={"inpainting": True},
        train={"steps": 2},
    )  # fmt: skip
    run(chosen, tmp_path / "run", settings)

    assert load_file(output)["model.diffusion_model.input_blocks.0.0.weight"].shape[1] == 9
    assert gouache.load(output, device="cpu", dtype="fp32", settings=settings).variant == "inpainting"


def test_class_pictures_are_painted_once_and_kept(narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path):
    chosen = settings_of(
        narrow("sd1").file, pictures, tmp_path / "out.safetensors", mode="dreambooth",
        data={"class_word": "a cat", "class_pictures": 3, "class_folder": str(tmp_path / "cats"), "trigger": "zorb"},
        loss={"prior": "pictures"}, adapter={"rank": 2}, train={"steps": 2},
    )  # fmt: skip
    run(chosen, tmp_path / "first", settings)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cats").iterdir()}
    run(chosen, tmp_path / "second", settings)

    assert len(times) == 3
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cats").iterdir()} == times


def test_another_rate_acts_at_once_with_equal_moments(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    model, output, folder = narrow("sd1").file, tmp_path / "out.safetensors", tmp_path / "run"
    adapter = {"rank": 2}
    run(settings_of(model, pictures, output, adapter=adapter), folder, settings, stop_after=2)
    before = load_file(folder / "step-00000002" / "optimizer.safetensors")

    changed = settings_of(
        model, pictures, output, adapter=adapter, train={"learning_rate": 3e-3, "schedule": "constant"}
    )
    run(changed, folder, settings)

    lines = [line for line in RunFolder(folder).log() if "rate" in line]
    assert [line["rate"] for line in lines if line["step"] > 2] == [3e-3, 3e-3]
    assert before
    changes = [(each["name"], each["step"]) for each in RunFolder(folder).state()["changes"]]
    assert ("settings.learning_rate", 2) in changes


@pytest.mark.parametrize("what", ["rank", "model"])
def test_what_cannot_change_is_refused_in_one_line(
    what: str, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    output, folder = tmp_path / "out.safetensors", tmp_path / "run"
    run(settings_of(narrow("sd1").file, pictures, output, adapter={"rank": 2}), folder, settings, stop_after=1)
    before = sorted(path.name for path in folder.iterdir())
    model = narrow("sd1-inpainting" if what == "model" else "sd1").file

    with pytest.raises(GouacheError, match=r"was trained with|do not fit") as caught:
        run(settings_of(model, pictures, output, adapter={"rank": 4 if what == "rank" else 2}), folder, settings)

    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("kind", ["empty", "unreadable", "caption", "family"])
def test_bad_input_is_one_line_before_any_weight_is_read(
    kind: str, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    model = narrow("sd1").file
    if kind == "empty":
        pictures = tmp_path / "none"
        pictures.mkdir()
    elif kind == "unreadable":
        (pictures / "9.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    elif kind == "caption":
        (pictures / "0.txt").write_bytes(b"\xff\xfe\x00\xd8")
    else:
        model = tmp_path / "unknown.safetensors"
        from safetensors.torch import save_file

        save_file({"a.weight": torch.zeros(2)}, model)

    with pytest.raises(GouacheError) as caught:
        run(settings_of(model, pictures, tmp_path / "out.safetensors", adapter={"rank": 2}), tmp_path / "run", settings)

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()

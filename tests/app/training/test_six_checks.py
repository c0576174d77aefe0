"""Further checks of whole runs: frozen parts, changed settings, markers in files, optimizers.

Exact repeats are in test_data_settings, caches in test_caches, the picture in diffusers in test_modes, a full disk in
test_full_disk.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import gouache
from gouache.app.settings import Settings
from gouache.app.training import prepare
from gouache.app.training.folder import RunFolder
from gouache.errors import GouacheError
from gouache.training import state
from tests.app.training.short_runs import run, settings_of
from tests.pipelines import Narrow, altered

Narrows = Callable[[str], Narrow]
WEIGHTS: dict[str, Any] = {"mode": "finetune", "adapter": {"form": "none"}, "validation": {"probe": 0}}


@pytest.mark.parametrize(
    ("family", "vae"),
    [
        ("sd1", torch.float32),
        ("sd2", None),
        *(pytest.param(each, None, marks=pytest.mark.full) for each in ("sd1", "sdxl")),
    ],
)
def test_fine_tuning_changes_no_bit_of_vae_and_text_encoders(
    family: str, vae: torch.dtype | None, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    """Also where the U-Net is stored in half precision and the VAE is not."""
    model, output = narrow(family).file, tmp_path / "out.safetensors"
    if vae is not None:

        def half(tensors: dict[str, torch.Tensor]) -> None:
            for name in tensors:
                if not name.startswith("first_stage_model."):
                    tensors[name] = tensors[name].half()

        model = altered(model, tmp_path / "half.safetensors", half)
    options = {"model": {"prediction": "v"}} if family == "sd2" else {}
    run(settings_of(model, pictures, output, **WEIGHTS, train={"steps": 2}, **options), tmp_path / "run", settings)

    before, after = load_file(model), load_file(output)
    unet = {name for name in before if name.startswith("model.diffusion_model.")}
    for name in before.keys() - unet:
        assert after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]), name
    assert any(not torch.equal(after[name].float(), before[name].float()) for name in unet)
    assert all(after[name].dtype == before[name].dtype for name in unet)


def test_another_rate_acts_at_once_on_equal_moments(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    """Step 3 has the gradient at the weights of step 2 in both, so its moments are equal, and its weights are not."""
    model, output = narrow("sd1").file, tmp_path / "out.safetensors"
    tables: dict[str, Any] = {"adapter": {"rank": 2}, "validation": {"probe": 0}}
    train = {"steps": 4, "save_steps": 1, "keep": 9, "schedule": "constant"}
    run(settings_of(model, pictures, output, **tables, train=train), tmp_path / "a", settings, stop_after=2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name, rate in (("a", 1e-2), ("b", 2e-3)):
        changed = settings_of(model, pictures, output, **tables, train={**train, "learning_rate": rate})
        run(changed, tmp_path / name, settings)
        rates = {line["step"]: line["rate"] for line in RunFolder(tmp_path / name).log() if "rate" in line}
        assert rates == {1: 1e-2, 2: 1e-2, 3: rate, 4: rate}

    def of(name: str, file: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / name / "step-00000003" / f"{file}.safetensors")

    moments, others = of("a", "optimizer"), of("b", "optimizer")
    assert moments.keys() == others.keys() and all(torch.equal(moments[key], others[key]) for key in moments)
    assert any(not torch.equal(tensor, of("b", "weights")[key]) for key, tensor in of("a", "weights").items())
    changes = [(each["name"], each["step"]) for each in RunFolder(tmp_path / "b").state()["changes"]]
    assert changes == [("settings.learning_rate", 2)]


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"adapter": {"form": "loha"}}, "form"),
        ({"adapter": {"form": "none"}}, "adapter"),
        ({"parts": {"text_encoder": True}}, "parts|layout"),
        ({"adapter": {"rank": 2, "ranks": {"M00": 1}}}, "layout"),
        ({"model": {"prediction": "v"}}, "prediction"),
    ],
)
def test_another_structure_is_refused_in_one_line(
    tables: dict[str, Any], said: str, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    usual: dict[str, Any] = {"adapter": {"rank": 2}, "validation": {"probe": 0}}
    model, output = narrow("sd1").file, tmp_path / "out.safetensors"
    run(settings_of(model, pictures, output, **usual), tmp_path / "run", settings, stop_after=1)
    changed = {**usual, **{name: {**usual.get(name, {}), **table} for name, table in tables.items()}}
    with pytest.raises(GouacheError, match=said) as caught:
        run(settings_of(model, pictures, output, **changed), tmp_path / "run", settings)
    assert "\n" not in str(caught.value)


CHANGED = {
    "data": {"flip": True, "caption_dropout": 0.5, "repeats": 2},
    "loss": {"weighting": "min-snr", "noise_offset": 0.1, "loss": "huber", "timestep_min": 0.1, "prior_weight": 0.5},
    "train": {"learning_rate": 5e-3, "schedule": "linear", "batch": 1, "accumulate": 2, "seed": 3, "optimizer": "sgd"},
}


@pytest.mark.parametrize("table", CHANGED)
def test_everything_else_may_change_and_is_recorded_with_its_step(
    table: str, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    usual: dict[str, Any] = {"adapter": {"rank": 2}, "validation": {"probe": 0}}
    model, output = narrow("sd1").file, tmp_path / "out.safetensors"
    run(settings_of(model, pictures, output, **usual), tmp_path / "run", settings, stop_after=2)
    finished = run(settings_of(model, pictures, output, **usual, **{table: CHANGED[table]}), tmp_path / "run", settings)
    changes = RunFolder(tmp_path / "run").state()["changes"]
    assert finished.step == 4 and changes and {each["step"] for each in changes} == {2}
    names = " ".join(each["name"] for each in changes)
    expected = {
        "data": ("objective.data", "objective.dropout"),
        "loss": ("weighting", "noise.offset", "distance", "timesteps.first", "prior_weight"),
        "train": ("learning_rate", "schedule", "batch", "accumulate", "seed", "optimizer"),
    }[table]
    assert all(each in names for each in expected)


def test_another_batch_size_finishes_the_epoch_that_has_begun(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    """Every picture is still seen once in it, also after a second change."""
    usual: dict[str, Any] = {"adapter": {"rank": 2}, "validation": {"probe": 0}, "data": {"repeats": 3}}
    model, output, folder = narrow("sd1").file, tmp_path / "out.safetensors", tmp_path / "run"

    def batches(batch: int) -> Any:
        chosen = settings_of(model, pictures, output, **usual, train={"steps": 30, "batch": batch})
        return prepare.prepared(chosen, RunFolder(folder), settings, on_note=lambda line: None,
                                on_work=lambda what, done, total: None, fill_caches=False)  # fmt: skip

    seen, number = Counter[str](), 0
    for batch, steps in ((4, 2), (1, 3), (2, 99)):
        with batches(batch) as found:
            plan = found.batches
            last = number + steps
            while number < last and plan.plan.batch(number)[0] == 0:
                examples = plan.examples(number)
                assert len(examples) <= batch
                seen.update(each.row.record.name for each in examples)
                number += 1
        if steps < 99:
            chosen = settings_of(model, pictures, output, **usual, train={"steps": 30, "batch": batch})
            run(chosen, folder, settings, stop_after=steps)
    assert seen == {f"{number}.png": 3 for number in range(5)}


@pytest.mark.parametrize("family", ["sd1", *(pytest.param(each, marks=pytest.mark.full) for each in ("sd2", "sdxl"))])
def test_zero_terminal_snr_and_velocity_are_marked_in_exported_files(
    family: str, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    tables: dict[str, Any] = {"model": {"prediction": "v", "zero_terminal_snr": True}, "train": {"steps": 1}}
    model = narrow(family).file
    adapter, whole = tmp_path / "lora.safetensors", tmp_path / "whole.safetensors"
    run(settings_of(model, pictures, adapter, **tables, adapter={"rank": 2}), tmp_path / "a", settings)
    run(settings_of(model, pictures, whole, **tables, **WEIGHTS), tmp_path / "b", settings)

    with safe_open(adapter, "pt") as opened:
        stated = opened.metadata()
    assert (stated["ss_zero_terminal_snr"], stated["ss_v_parameterization"]) == ("True", "True")
    assert stated["modelspec.prediction_type"] == "v"
    markers = {"ztsnr"} if family == "sd2" else {"ztsnr", "v_pred"}
    assert markers <= load_file(whole).keys()
    loaded = gouache.load(whole, device="cpu", dtype="fp32", settings=settings)
    assert loaded.prediction == "v" and float(loaded.schedule.alphas_cumprod[-1]) < 1e-7


OPTIMIZERS = [("schedule-free", "schedulefree", 1e-2)]
MORE = [("muon", "torch", 1e-2), ("prodigy", "prodigyopt", 1.0), ("lion", "lion_pytorch", 1e-3),
        ("adafactor", "torch", 1e-2),
        ("sgd", "torch", 1e-1), ("adam", "torch", 1e-2), ("torch.optim.NAdam", "torch", 1e-2)]  # fmt: skip


@pytest.mark.parametrize(
    ("optimizer", "package", "rate"), [*OPTIMIZERS, *(pytest.param(*each, marks=pytest.mark.full) for each in MORE)]
)
def test_every_optimizer_trains_resumes_bit_for_bit_and_exports_what_it_samples(
    optimizer: str, package: str, rate: float, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    """Schedule-free ones have other weights for samples, validation and files than those that they train."""
    pytest.importorskip(package)
    output = tmp_path / "out.safetensors"
    train = {"steps": 4, "optimizer": optimizer, "learning_rate": rate, "validate_steps": 2, "save_steps": 1, "keep": 9}
    chosen = settings_of(narrow("sd1").file, pictures, output, adapter={"rank": 2}, train=train,
                         samples={"every": 2, "steps": 1})  # fmt: skip
    run(chosen, tmp_path / "whole", settings)
    exported = load_file(output)
    run(chosen, tmp_path / "parts", settings, stop_after=2)
    run(chosen, tmp_path / "parts", settings)
    assert load_file(output).keys() == exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in load_file(output).items())

    found = state.read(tmp_path / "whole/step-00000004")
    moved = {name for name, tensor in found.tensors["weights"].items() if "lora_up" in name and bool(tensor.any())}
    assert moved
    if optimizer == "schedule-free":
        averages = found.tensors["ema"]
        name = sorted(moved)[0]
        assert not torch.equal(averages[name], found.tensors["weights"][name])
        stored = [tensor for key, tensor in exported.items() if "lora_up" in key]
        assert any(
            torch.equal(tensor, averages[name].half()) for tensor in stored if tensor.shape == averages[name].shape
        )

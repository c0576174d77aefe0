"""Exported models: names of released files, averages, markers; opened by us and diffusers with the trained output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import gouache
from gouache import Model
from gouache.errors import RequestError
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.training.targets.export import Averages, average_name
from gouache.training.targets.weights import WeightsOptions, WeightsTarget
from gouache.workshop.convert import convert
from tests.layouts.manifests import shapes
from tests.marks import usual
from tests.pipelines import Narrow, altered
from tests.training.targets.steps import FAMILIES, output, train, weights
from tests.training.targets.test_export_adapters import close, of_diffusers, of_ours

UNET = "model.diffusion_model."


def load(path: Path) -> Model:
    return gouache.load(path, device="cpu", dtype="fp32")


def trained(model: Model, parts: tuple[str, ...] = ("unet",), **options: Any) -> tuple[WeightsTarget, Averages]:
    """A target trained for two steps, and averages that differ from its weights."""
    target = WeightsTarget(model, WeightsOptions(parts, **options))
    before = weights(target)
    train(model, target, steps=2, rate=1e-3)
    means = {name: (tensor + before[name]) / 2 for name, tensor in weights(target).items()}
    return target, Averages(means, 0.999, 2)


FORMS = ("full", "pruned", "pruned-emaonly")
CASES = [(family, form) for family in FAMILIES for form in FORMS]


@pytest.mark.parametrize(("family", "form"), usual(CASES, [*CASES[: len(FORMS)], ("sdxl", "pruned")]))
def test_each_form_has_the_names_of_released_files_and_the_trained_output(
    family: str, form: str, narrow: Callable[[str], Narrow], tmp_path: Path
):
    model, base = load(narrow(family).file), load_file(narrow(family).file)
    parts = ("unet", *model.text_encoders) if form == "full" else ("unet",)
    target, averages = trained(model, parts)
    path = tmp_path / "new.safetensors"

    target.export({}, path, form=form, metadata={"ss_steps": "2"}, averages=averages)

    written = load_file(path)
    # Released files name averages without dots, as in v1-5-pruned: model_ema.diffusion_modelinput_blocks00weight
    means = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): name for name in base if name.startswith(UNET)
    }
    counters = {"model_ema.decay", "model_ema.num_updates"}
    assert written.keys() == base.keys() | counters | (set() if form == "pruned-emaonly" else means.keys())
    assert float(written["model_ema.decay"]) == pytest.approx(0.999) and int(written["model_ema.num_updates"]) == 2
    for name, tensor in base.items():
        if name.startswith("first_stage_model.") or (form != "full" and not name.startswith(UNET)):
            assert torch.equal(written[name], tensor), name
    if form != "pruned-emaonly":
        for mean, name in means.items():
            assert torch.equal(written[mean], averages.weights["unet." + name.removeprefix(UNET)]), mean

    found = identify(open_model(path))
    assert found.family.value is model.family and not found.unknown and not found.missing
    assert found.ema is not None and found.ema.value == ("counters" if form == "pruned-emaonly" else "both")
    if form == "pruned-emaonly":
        for key, parameter in model.unet.named_parameters():
            parameter.data = averages.weights[f"unet.{key}"]
    loaded = load(path)
    assert (loaded.prediction, loaded.variant) == (model.prediction, model.variant)
    torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_opens_a_converted_export_with_the_same_output(
    family: str, narrow: Callable[[str], Narrow], tmp_path: Path
):
    from diffusers import UNet2DConditionModel

    model = load(narrow(family).file)
    target, _ = trained(model)

    target.export({}, tmp_path / "new.safetensors", form="pruned", metadata={})
    convert(tmp_path / "new.safetensors", tmp_path / "folder")

    close(of_diffusers(model, UNet2DConditionModel.from_pretrained(tmp_path / "folder" / "unet")), of_ours(model))


def test_diffusers_reads_the_single_file_itself(narrow: Callable[[str], Narrow], tmp_path: Path):
    """By its own conversion of the original names, given the narrow network's configuration."""
    from diffusers import UNet2DConditionModel

    model = load(narrow("sd1").file)
    target, averages = trained(model)
    target.export({}, tmp_path / "new.safetensors", form="pruned-emaonly", metadata={}, averages=averages)
    for key, parameter in model.unet.named_parameters():
        parameter.data = averages.weights[f"unet.{key}"]

    unet = UNet2DConditionModel.from_single_file(
        str(tmp_path / "new.safetensors"), config=str(narrow("sd1").folder), subfolder="unet", local_files_only=True
    )

    close(of_diffusers(model, unet), of_ours(model))


def test_average_names_are_those_of_the_released_file():
    listed = shapes("sd15_pruned_full")
    unet = [name.removeprefix(UNET) for name in listed if name.startswith(UNET)]
    assert {average_name(name) for name in unet} == {n for n in listed if n.startswith("model_ema.diffusion_model")}


def test_leftovers_of_the_base_are_kept_in_full_and_left_out_in_pruned(narrow: Callable[[str], Narrow], tmp_path: Path):
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["betas"] = torch.linspace(0, 1, 1000, dtype=torch.float64)
        tensors["first_stage_model.loss.logvar"] = torch.zeros(3)
        for name in [name for name in tensors if name.startswith(UNET)]:
            tensors["model_ema." + name.removeprefix("model.").replace(".", "")] = tensors[name] + 1

    model = load(altered(narrow("sd1").file, tmp_path / "base.safetensors", add))
    target, averages = trained(model)

    target.export({}, tmp_path / "full.safetensors", form="full", metadata={})
    target.export({}, tmp_path / "pruned.safetensors", form="pruned", metadata={}, averages=averages)

    full, pruned = load_file(tmp_path / "full.safetensors"), load_file(tmp_path / "pruned.safetensors")
    assert {"betas", "first_stage_model.loss.logvar"} <= full.keys() and "betas" in pruned
    assert "first_stage_model.loss.logvar" not in pruned
    assert not any(name.startswith("model_ema.") for name in full)  # those of the base are of other weights
    key = "model_ema.diffusion_modeltime_embed0weight"
    assert torch.equal(pruned[key], averages.weights["unet.time_embed.0.weight"])


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_base_in_a_folder_becomes_a_single_file(suffix: str, narrow: Callable[[str], Narrow], tmp_path: Path):
    model = load(narrow("sd2").folder)
    target, _ = trained(model, ("unet", "text_encoder"))

    target.export({}, tmp_path / f"new{suffix}", form="pruned", metadata={})

    assert set(open_model(tmp_path / f"new{suffix}")) == set(load_file(narrow("sd2").file))
    found = identify(open_model(tmp_path / f"new{suffix}"), prediction="v")
    loaded = gouache.load(tmp_path / f"new{suffix}", device="cpu", dtype="fp32", prediction="v")
    assert not found.unknown
    torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)


def test_a_grown_unet_is_an_inpainting_model(narrow: Callable[[str], Narrow], tmp_path: Path):
    model = load(narrow("sd1").file)
    target, _ = trained(model, in_channels=9)

    target.export({}, tmp_path / "new.safetensors", form="pruned", metadata={})

    loaded = load(tmp_path / "new.safetensors")
    assert loaded.variant == "inpainting" and loaded.found.variant.confidence == "certain"
    torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)


def test_zero_terminal_snr_and_v_prediction_are_marked(narrow: Callable[[str], Narrow], tmp_path: Path):
    model = load(narrow("sd1").file)
    model.core.schedule, model.core.prediction = model.schedule.zero_terminal_snr(), "v"
    target, _ = trained(model)

    target.export({}, tmp_path / "new.safetensors", form="pruned", metadata={})

    written = load_file(tmp_path / "new.safetensors")
    assert written["v_pred"].numel() == 0 and written["ztsnr"].numel() == 0
    loaded = load(tmp_path / "new.safetensors")
    assert loaded.prediction == "v" and loaded.schedule.sigma_max == pytest.approx(4518.8, rel=1e-4)
    again, _ = trained(loaded)
    again.export({}, tmp_path / "again.safetensors", form="full", metadata={})
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "again.safetensors").keys()


def test_given_weights_and_dtype_are_written(narrow: Callable[[str], Narrow], tmp_path: Path):
    model = load(narrow("sd1").file)
    target, _ = trained(model)
    halves = {name: tensor / 2 for name, tensor in weights(target).items()}

    target.export(halves, tmp_path / "new.safetensors", form="pruned", metadata={}, dtype="bf16")

    written = load_file(tmp_path / "new.safetensors")
    name = f"{UNET}time_embed.0.weight"
    assert torch.equal(written[name], halves["unet.time_embed.0.weight"].bfloat16())
    assert {tensor.dtype for key, tensor in written.items() if key.startswith(UNET)} == {torch.bfloat16}
    others = {key: tensor for key, tensor in written.items() if not key.startswith(UNET)}
    before = load_file(narrow("sd1").file)
    assert others and all(torch.equal(tensor, before[key]) for key, tensor in others.items())


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("a.safetensors", "adapter", "not a form of trained weights; use full, pruned, pruned-emaonly"),
        ("a.safetensors", "pruned-emaonly", "needs averages, and the run keeps none"),
        ("a", "pruned", "does not end in .safetensors or .ckpt"),
    ],
)
def test_what_trained_weights_cannot_be_is_refused(
    name: str, form: str, message: str, narrow: Callable[[str], Narrow], tmp_path: Path
):
    target = WeightsTarget(load(narrow("sd1").file), WeightsOptions())
    with pytest.raises(RequestError, match=message):
        target.export({}, tmp_path / name, form=form, metadata={})
    assert not list(tmp_path.iterdir())

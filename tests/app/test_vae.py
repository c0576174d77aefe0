"""The autoencoder of a checkpoint: the one requested, one next to the file, its own, or one from the library."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gouache
from gouache.app.settings import Settings
from gouache.errors import GouacheError, ModelError
from tests.pipelines import Narrow

VAE = "first_stage_model."


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models" / "VAE").mkdir(parents=True)
    return tmp_path / "models"


@pytest.fixture
def ours(tmp_path: Path, models: Path) -> Settings:
    return Settings((models,), tmp_path / "out", None, None, tmp_path / "cache", tmp_path / "data")


def parts(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(all tensors except the VAE's, those of the VAE without their prefix)"""
    tensors = load_file(file)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(VAE)}
    return rest, {name.removeprefix(VAE): tensor for name, tensor in tensors.items() if name.startswith(VAE)}


def scaled(vae: dict[str, Tensor]) -> dict[str, Tensor]:
    """Another VAE, of the same shapes."""
    return {name: tensor * 1.1 for name, tensor in vae.items()}


def used(model: gouache.Model, vae: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, vae[name]) for name, tensor in model.vae.state_dict().items())


def load(path: Path, settings: Settings, vae: str | None = None) -> tuple[gouache.Model, list[str]]:
    """The model, and the notes on the choice of its VAE."""
    notes: list[str] = []
    return gouache.load(path, dtype="fp32", vae=vae, settings=settings, on_note=notes.append), notes


def test_its_own_by_default(narrow: Callable[[str], Narrow], ours: Settings, models: Path):
    _, vae = parts(narrow("sd1").file)
    save_file(scaled(vae), models / "VAE" / "another.safetensors")

    model, notes = load(narrow("sd1").file, ours)

    assert used(model, vae) and not notes and model.vae_file is None


def test_one_requested_by_name_by_path_or_from_another_checkpoint(
    narrow: Callable[[str], Narrow], ours: Settings, models: Path, tmp_path: Path
):
    rest, vae = parts(narrow("sd1").file)
    loss = {"loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4), "loss.logvar": torch.zeros(())}
    save_file({**scaled(vae), **loss}, models / "VAE" / "another.safetensors")  # as files of its trainers have it
    save_file({**rest, **{VAE + name: tensor for name, tensor in scaled(vae).items()}}, tmp_path / "whole.safetensors")

    for name in ("another", str(models / "VAE" / "another.safetensors"), str(tmp_path / "whole.safetensors")):
        model, _ = load(narrow("sd1").file, ours, name)
        assert used(model, scaled(vae)) and model.vae_file is not None
    with pytest.raises(GouacheError, match="vae"):
        load(narrow("sd1").file, ours, "nowhere")


def test_a_file_next_to_the_checkpoint_with_its_name_is_used(
    narrow: Callable[[str], Narrow], ours: Settings, tmp_path: Path
):
    _, vae = parts(narrow("sd1").file)
    path = Path(shutil.copy(narrow("sd1").file, tmp_path / "photo.safetensors"))
    torch.save({"state_dict": scaled(vae)}, tmp_path / "photo.vae.pt")

    model, notes = load(path, ours)
    assert used(model, scaled(vae)) and "photo.vae.pt" in notes[0]
    model, notes = load(path, ours, "none")
    assert used(model, vae) and not notes


def test_the_one_that_the_library_notes_for_the_checkpoint_is_used(
    narrow: Callable[[str], Narrow], ours: Settings, models: Path, tmp_path: Path
):
    from gouache.app.library import Library

    _, vae = parts(narrow("sd1").file)
    (models / "Stable-diffusion").mkdir()
    path = Path(shutil.copy(narrow("sd1").file, models / "Stable-diffusion" / "photo.safetensors"))
    save_file(scaled(vae), models / "VAE" / "mine.safetensors")
    with Library.of(ours) as library:
        library.refresh()
        library.describe(path, vae=str(models / "VAE" / "mine.safetensors"))

    model, (note,) = load(path, ours)
    assert used(model, scaled(vae)) and "mine.safetensors, which the library notes for photo.safetensors" in note
    assert used(load(path, ours, "none")[0], vae)
    (models / "VAE" / "mine.safetensors").unlink()
    assert used(load(path, ours)[0], vae)


@pytest.mark.parametrize("damage", ["absent", "NaN", "a tensor short"])
def test_a_checkpoint_without_a_usable_one_gets_one_from_the_library(
    damage: str, narrow: Callable[[str], Narrow], ours: Settings, models: Path, tmp_path: Path
):
    rest, vae = parts(narrow("sd1").file)
    broken = dict(vae)
    if damage == "absent":
        broken = {}
    elif damage == "NaN":
        broken["decoder.conv_in.weight"] = torch.full_like(vae["decoder.conv_in.weight"], math.nan)
    else:
        broken.pop("quant_conv.bias")
    path = tmp_path / "photo.safetensors"
    save_file({**rest, **{VAE + name: tensor for name, tensor in broken.items()}}, path)

    with pytest.raises(ModelError) as refused:
        load(path, ours)
    assert "--vae FILE" in str(refused.value) and "\n" not in str(refused.value)

    save_file(vae, models / "VAE" / "a-plain-one.safetensors")
    save_file(scaled(vae), models / "VAE" / "vae-ft-mse-840000.safetensors")
    save_file(scaled(scaled(vae)), models / "VAE" / "aa-sdxl_vae.safetensors")
    model, (note,) = load(path, ours)

    assert used(model, scaled(vae))  # the one recommended for this family
    assert "vae-ft-mse-840000.safetensors" in note and "photo.safetensors" in note
    assert next(model.paint("a cat", steps=1, size=(64, 64))).recipe["adapters"][0]["kind"] == "vae"


def test_a_vae_for_other_latents_is_refused_in_one_line(
    narrow: Callable[[str], Narrow], ours: Settings, tmp_path: Path
):
    _, vae = parts(narrow("sd1").file)
    for name in ("encoder.conv_out.weight", "encoder.conv_out.bias", "quant_conv.weight", "quant_conv.bias"):
        vae[name] = torch.cat([vae[name]] * 2)
    vae["quant_conv.weight"] = torch.cat([vae["quant_conv.weight"]] * 2, 1)
    for name in ("post_quant_conv.weight", "decoder.conv_in.weight"):
        vae[name] = torch.cat([vae[name]] * 2, 1)
    for name in ("post_quant_conv.weight", "post_quant_conv.bias"):
        vae[name] = torch.cat([vae[name]] * 2)
    save_file(vae, tmp_path / "wide.safetensors")
    model, _ = load(narrow("sd1").file, ours)

    for attempt in (
        lambda: load(narrow("sd1").file, ours, str(tmp_path / "wide.safetensors")),
        lambda: next(model.paint("a cat", vae=str(tmp_path / "wide.safetensors"), steps=1, size=(64, 64))),
    ):
        with pytest.raises(GouacheError) as refused:
            attempt()
        assert "8" in str(refused.value) and "\n" not in str(refused.value)

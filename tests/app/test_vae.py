"""Which autoencoder a checkpoint gets: asked for, beside it, its own, or one of the library in its place."""

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
def shelf(tmp_path: Path) -> Path:
    (tmp_path / "models" / "VAE").mkdir(parents=True)
    return tmp_path / "models"


@pytest.fixture
def ours(tmp_path: Path, shelf: Path) -> Settings:
    return Settings((shelf,), tmp_path / "out", None, None, tmp_path / "cache", tmp_path / "data")


def parts(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(everything but the VAE, the VAE under names of its own)"""
    tensors = load_file(file)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(VAE)}
    return rest, {name.removeprefix(VAE): tensor for name, tensor in tensors.items() if name.startswith(VAE)}


def other(vae: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor * 1.1 for name, tensor in vae.items()}


def used(model: gouache.Model, vae: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, vae[name]) for name, tensor in model.vae.state_dict().items())


def load(path: Path, settings: Settings, vae: str | None = None) -> tuple[gouache.Model, list[str]]:
    said: list[str] = []
    return gouache.load(path, dtype="fp32", vae=vae, settings=settings, on_note=said.append), said


def test_its_own_where_nothing_else_is_said(narrow: Callable[[str], Narrow], ours: Settings, shelf: Path):
    _, vae = parts(narrow("sd1").file)
    save_file(other(vae), shelf / "VAE" / "another.safetensors")

    model, said = load(narrow("sd1").file, ours)

    assert used(model, vae) and not said and model.vae_file is None


def test_one_asked_for_by_name_by_path_or_out_of_a_checkpoint(
    narrow: Callable[[str], Narrow], ours: Settings, shelf: Path, tmp_path: Path
):
    rest, vae = parts(narrow("sd1").file)
    loss = {"loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4), "loss.logvar": torch.zeros(())}
    save_file({**other(vae), **loss}, shelf / "VAE" / "another.safetensors")  # as its trainers leave it
    save_file({**rest, **{VAE + name: tensor for name, tensor in other(vae).items()}}, tmp_path / "whole.safetensors")

    for told in ("another", str(shelf / "VAE" / "another.safetensors"), str(tmp_path / "whole.safetensors")):
        model, _ = load(narrow("sd1").file, ours, told)
        assert used(model, other(vae)) and model.vae_file is not None
    with pytest.raises(GouacheError, match="vae"):
        load(narrow("sd1").file, ours, "nowhere")


def test_what_stands_beside_a_checkpoint_is_its_own(narrow: Callable[[str], Narrow], ours: Settings, tmp_path: Path):
    _, vae = parts(narrow("sd1").file)
    path = Path(shutil.copy(narrow("sd1").file, tmp_path / "photo.safetensors"))
    torch.save({"state_dict": other(vae)}, tmp_path / "photo.vae.pt")

    model, said = load(path, ours)
    assert used(model, other(vae)) and "photo.vae.pt" in said[0]
    model, said = load(path, ours, "none")
    assert used(model, vae) and not said


def test_what_the_library_notes_for_a_checkpoint(
    narrow: Callable[[str], Narrow], ours: Settings, shelf: Path, tmp_path: Path
):
    from gouache.app.library import Library

    _, vae = parts(narrow("sd1").file)
    (shelf / "Stable-diffusion").mkdir()
    path = Path(shutil.copy(narrow("sd1").file, shelf / "Stable-diffusion" / "photo.safetensors"))
    save_file(other(vae), shelf / "VAE" / "mine.safetensors")
    with Library.of(ours) as library:
        library.refresh()
        library.describe(path, vae=str(shelf / "VAE" / "mine.safetensors"))

    model, (said,) = load(path, ours)
    assert used(model, other(vae)) and "mine.safetensors, which the library notes for photo.safetensors" in said
    assert used(load(path, ours, "none")[0], vae)
    (shelf / "VAE" / "mine.safetensors").unlink()
    assert used(load(path, ours)[0], vae)


@pytest.mark.parametrize("damage", ["absent", "NaN", "a tensor short"])
def test_a_checkpoint_without_a_good_one_is_explained_and_gets_one_that_fits(
    damage: str, narrow: Callable[[str], Narrow], ours: Settings, shelf: Path, tmp_path: Path
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

    save_file(vae, shelf / "VAE" / "a-plain-one.safetensors")
    save_file(other(vae), shelf / "VAE" / "vae-ft-mse-840000.safetensors")
    save_file(other(other(vae)), shelf / "VAE" / "aa-sdxl_vae.safetensors")
    model, (said,) = load(path, ours)

    assert used(model, other(vae))  # the one that is usual for this line
    assert "vae-ft-mse-840000.safetensors" in said and "photo.safetensors" in said
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

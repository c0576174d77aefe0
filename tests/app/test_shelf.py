"""LoRAs, hypernetworks and embeddings found by the names that prompts use, and again from a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import gouache
from gouache.app.library import Library
from gouache.app.repaint import repaint
from gouache.app.settings import Settings
from gouache.app.shelf import LibraryShelf
from gouache.errors import RequestError
from tests.adapters.loras import factors, save_kohya
from tests.pipelines import Narrow

KNOBS = {"steps": 2, "size": (64, 64), "seed": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("Lora/faces", "embeddings", "hypernetworks", "VAE"):
        (tmp_path / "models" / name).mkdir(parents=True)
    return tmp_path / "models"


@pytest.fixture
def ours(tmp_path: Path, folder: Path) -> Settings:
    return Settings((folder,), tmp_path / "out", None, None, tmp_path / "cache", tmp_path / "data")


@pytest.fixture
def model(narrow: Callable[[str], Narrow], ours: Settings, folder: Path) -> gouache.Model:
    loaded = gouache.load(narrow("sd1").file, dtype="fp32", settings=ours)
    save_kohya(folder / "Lora" / "faces" / "old.safetensors", loaded, factors(loaded))
    for number, name in enumerate(("zorblax", "bad hands", "cat")):
        save_file({"emb_params": torch.randn(2, 64, generator=torch.Generator().manual_seed(number))},
                  folder / "embeddings" / f"{name}.safetensors")  # fmt: skip
    return loaded


def test_names_as_a1111_has_them(model: gouache.Model, ours: Settings, folder: Path):
    shelf = LibraryShelf(ours)
    path = folder / "Lora" / "faces" / "old.safetensors"

    for name in ("old", "faces/old", "old.safetensors", "OLD", str(path)):
        assert shelf.find("lora", name) == path
    with pytest.raises(RequestError, match="lora: there is no file 'odl' and no lora of that name; similar names: old"):
        shelf.find("lora", "odl")


def test_embeddings_that_a_prompt_mentions(model: gouache.Model, ours: Settings):
    shelf = LibraryShelf(ours)

    def mentioned(*prompts: str) -> set[str]:
        return set(shelf.mentioned(prompts, model.text_widths))

    assert mentioned("a ZORBLAX on a hill", "(bad hands:1.2), blurry") == {"zorblax", "bad hands"}
    assert mentioned("embedding:zorblax, a category") == {"zorblax"}
    assert not mentioned("zorblaxes, bad, hands")


def test_those_of_other_models_are_passed_over(model: gouache.Model, ours: Settings, folder: Path):
    (folder / "embeddings" / "xl").mkdir()
    both = {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)}
    for name in ("aaa/zorblax", "moose"):
        (folder / "embeddings" / name).parent.mkdir(exist_ok=True)
        save_file(both, folder / "embeddings" / f"{name}.safetensors")
    shelf = LibraryShelf(ours)
    prompts = ["a zorblax and a moose"]

    assert shelf.mentioned(prompts, model.text_widths) == {"zorblax": folder / "embeddings" / "zorblax.safetensors"}
    assert shelf.passed_over(prompts, model.text_widths) == [folder / "embeddings" / "moose.safetensors"]
    xl = shelf.mentioned(prompts, {"text_encoder": 768, "text_encoder_2": 1280})
    assert {path.parent.name for path in xl.values()} == {"aaa", "embeddings"}
    next(model.paint("a zorblax and a moose", **KNOBS))


def test_a_model_is_no_lora(model: gouache.Model):
    with pytest.raises(RequestError, match="lora: there is no file 'mini'"):
        next(model.paint("a fox <lora:mini:1>", **KNOBS))


def test_a_bare_name_and_a_tag_are_enough(model: gouache.Model, folder: Path):
    plain = next(model.paint("a fox", **KNOBS))

    by_name = next(model.paint("a zorblax fox <lora:old:0.5>", **KNOBS))
    by_path = next(model.paint("a zorblax fox", lora=f"{folder / 'Lora/faces/old.safetensors'}:0.5", **KNOBS))

    assert torch.equal(by_name.latent, by_path.latent) and not torch.equal(by_name.latent, plain.latent)
    assert [(each["kind"], each["name"]) for each in by_name.recipe["splices"]] == [
        ("lora", "old"), ("embedding", "zorblax")
    ]  # fmt: skip
    assert not model.embeddings and not list(model.layers)


def test_the_usual_strength_is_what_the_user_said_of_it(model: gouache.Model, ours: Settings, folder: Path):
    path = folder / "Lora" / "faces" / "old.safetensors"
    with Library.of(ours) as library:
        library.refresh()
        library.describe(path, weight=0.4)

    told = next(model.paint("a fox <lora:old>", **KNOBS)).recipe["splices"][0]

    assert told["strength"]["unet"] == 0.4


def test_what_was_attached_by_hand_and_usual_strengths_are_in_the_recipe(
    model: gouache.Model, ours: Settings, folder: Path, tmp_path: Path
):
    path = folder / "Lora" / "faces" / "old.safetensors"
    with Library.of(ours) as library:
        library.refresh()
        library.describe(path, weight=0.4)
        usual = next(model.paint("a fox <lora:old>", **KNOBS)).save(tmp_path / "usual.png")
        library.describe(path, weight=0.9)
    on = model.attach(path, gouache.Strength(0.5, 0.1))
    by_hand = next(model.paint("a fox", **KNOBS)).save(tmp_path / "hand.png")
    on.detach()

    assert repaint(usual, ours).identical and repaint(by_hand, ours).identical


@pytest.mark.parametrize("change", ["none", "moved", "other"])
def test_a_picture_with_splices_is_made_again(
    change: str, model: gouache.Model, ours: Settings, folder: Path, tmp_path: Path
):
    path = folder / "Lora" / "faces" / "old.safetensors"
    picture = next(model.paint("a zorblax <lora:old:0.5>", **KNOBS))
    saved = picture.save(tmp_path / "a.png")
    if change == "moved":
        with Library.of(ours) as library:
            library.refresh()
            while library.hash_next() is not None:
                pass
        path.rename(folder / "Lora" / "renamed.safetensors")
    elif change == "other":
        save_kohya(path, model, factors(model, seed=9))

    again = repaint(saved, ours)

    assert again.identical == (change != "other")
    if change == "other":
        assert any("the lora old is another" in cause for cause in again.causes)
    assert json.dumps(picture.recipe)

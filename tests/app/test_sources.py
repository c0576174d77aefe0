"""LoRAs, hypernetworks and embeddings are found by the names in prompts, and again by a recipe."""

from __future__ import annotations

import hashlib
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import gouache
from gouache.app.library import Library
from gouache.app.recorded import RecordedSource
from gouache.app.repaint import repaint
from gouache.app.settings import Settings
from gouache.app.sources import LibrarySource
from gouache.errors import RequestError
from gouache.generate.notes import unescaped_names
from gouache.prompts.grammar import escape
from tests.adapters.loras import factors, save_kohya
from tests.pipelines import Narrow

KNOBS = {"steps": 2, "size": (64, 64), "seed": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("Lora/faces", "embeddings", "hypernetworks", "VAE"):
        (tmp_path / "models" / name).mkdir(parents=True)
    return tmp_path / "models"


@pytest.fixture
def own(tmp_path: Path, folder: Path) -> Settings:
    return Settings((folder,), tmp_path / "out", None, None, tmp_path / "cache", tmp_path / "data")


@pytest.fixture
def model(narrow: Callable[[str], Narrow], own: Settings, folder: Path) -> gouache.Model:
    loaded = gouache.load(narrow("sd1").file, dtype="fp32", settings=own)
    save_kohya(folder / "Lora" / "faces" / "old.safetensors", loaded, factors(loaded))
    for number, name in enumerate(("zorblax", "bad hands", "cat")):
        save_file({"emb_params": torch.randn(2, 64, generator=torch.Generator().manual_seed(number))},
                  folder / "embeddings" / f"{name}.safetensors")  # fmt: skip
    return loaded


def test_names_as_in_a1111(model: gouache.Model, own: Settings, folder: Path):
    source = LibrarySource(own)
    path = folder / "Lora" / "faces" / "old.safetensors"

    for name in ("old", "faces/old", "old.safetensors", "OLD", str(path)):
        assert source.find("lora", name) == path
    with pytest.raises(RequestError, match="lora: there is no file 'odl' and no lora of that name; similar names: old"):
        source.find("lora", "odl")


def test_embeddings_mentioned_in_a_prompt(model: gouache.Model, own: Settings):
    source = LibrarySource(own)

    def mentioned(*prompts: str) -> set[str]:
        return set(source.mentioned(prompts, model.text_widths))

    assert mentioned("a ZORBLAX on a hill", "(bad hands:1.2), blurry") == {"zorblax", "bad hands"}
    assert mentioned("embedding:zorblax, a category") == {"zorblax"}
    assert not mentioned("zorblaxes, bad, hands")


def test_embeddings_of_other_models_are_listed_separately(model: gouache.Model, own: Settings, folder: Path):
    (folder / "embeddings" / "xl").mkdir()
    both = {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)}
    for name in ("aaa/zorblax", "moose"):
        (folder / "embeddings" / name).parent.mkdir(exist_ok=True)
        save_file(both, folder / "embeddings" / f"{name}.safetensors")
    source = LibrarySource(own)
    prompts = ["a zorblax and a moose"]

    assert source.mentioned(prompts, model.text_widths) == {"zorblax": folder / "embeddings" / "zorblax.safetensors"}
    assert source.mentioned_for_other_models(prompts, model.text_widths) == [
        folder / "embeddings" / "moose.safetensors"
    ]
    xl = source.mentioned(prompts, {"text_encoder": 768, "text_encoder_2": 1280})
    assert {path.parent.name for path in xl.values()} == {"aaa", "embeddings"}
    next(model.paint("a zorblax and a moose", **KNOBS))


def test_a_model_is_not_found_as_a_lora(model: gouache.Model):
    with pytest.raises(RequestError, match="there is no lora named 'mini'"):
        next(model.paint("a fox <lora:mini:1>", **KNOBS))


def test_names_and_tags_give_the_same_picture_as_paths(model: gouache.Model, folder: Path):
    plain = next(model.paint("a fox", **KNOBS))

    by_name = next(model.paint("a zorblax fox <lora:old:0.5>", **KNOBS))
    by_path = next(model.paint("a zorblax fox", lora=f"{folder / 'Lora/faces/old.safetensors'}:0.5", **KNOBS))

    assert torch.equal(by_name.latent, by_path.latent) and not torch.equal(by_name.latent, plain.latent)
    assert [(each["kind"], each["name"]) for each in by_name.recipe["adapters"]] == [
        ("lora", "old"), ("embedding", "zorblax")
    ]  # fmt: skip
    assert not model.embeddings and not list(model.adapters)


def test_the_default_strength_is_the_weight_set_by_the_user(model: gouache.Model, own: Settings, folder: Path):
    path = folder / "Lora" / "faces" / "old.safetensors"
    with Library.of(own) as library:
        library.refresh()
        library.describe(path, weight=0.4)

    used = next(model.paint("a fox <lora:old>", **KNOBS)).recipe["adapters"][0]

    assert used["strength"]["unet"] == 0.4


def test_attached_adapters_and_default_strengths_are_recorded(
    model: gouache.Model, own: Settings, folder: Path, tmp_path: Path
):
    path = folder / "Lora" / "faces" / "old.safetensors"
    with Library.of(own) as library:
        library.refresh()
        library.describe(path, weight=0.4)
        by_default = next(model.paint("a fox <lora:old>", **KNOBS)).save(tmp_path / "default.png")
        library.describe(path, weight=0.9)
    on = model.attach(path, gouache.Strength(0.5, 0.1))
    attached = next(model.paint("a fox", **KNOBS)).save(tmp_path / "attached.png")
    on.detach()

    assert repaint(by_default, own).identical and repaint(attached, own).identical


@pytest.mark.parametrize("change", ["none", "moved", "other"])
def test_a_picture_with_adapters_is_reproduced(
    change: str, model: gouache.Model, own: Settings, folder: Path, tmp_path: Path
):
    path = folder / "Lora" / "faces" / "old.safetensors"
    picture = next(model.paint("a zorblax <lora:old:0.5>", **KNOBS))
    saved = picture.save(tmp_path / "a.png")
    if change == "moved":
        with Library.of(own) as library:
            library.refresh()
            while library.hash_next() is not None:
                pass
        path.rename(folder / "Lora" / "renamed.safetensors")
    elif change == "other":
        save_kohya(path, model, factors(model, seed=9))

    again = repaint(saved, own)

    assert again.identical == (change != "other")
    if change == "other":
        assert any("the lora old is another" in cause for cause in again.causes)
    assert json.dumps(picture.recipe)


def test_a_recipe_opens_no_file_outside_the_library_unless_it_has_its_hash(own: Settings, folder: Path, tmp_path: Path):
    outside = tmp_path / "outside.safetensors"
    save_file({"emb_params": torch.zeros(2, 64)}, outside)
    digest = hashlib.sha256(outside.read_bytes()).hexdigest()

    def find(path: object, sha256: str) -> Path:
        source = RecordedSource(own, [{"kind": "lora", "setting": "x:1", "path": path, "sha256": sha256}])
        return source.find("lora", "x")

    assert find(str(outside), digest) == outside
    for path, sha256 in (
        (str(outside), "0" * 64),
        (str(outside), ""),
        ("/etc/passwd", ""),
        ("a" * 5000, "0" * 64),
        ("\0", ""),
    ):
        with pytest.raises(RequestError) as caught:
            find(path, sha256)
        assert "\n" not in str(caught.value)


def test_a_library_that_cannot_be_opened_does_not_prevent_painting(own: Settings, folder: Path, tmp_path: Path):
    (tmp_path / "data").write_text("a file where the folder should be")

    assert LibrarySource(own).default_strength(folder / "Lora/faces/old.safetensors") == 1.0


def test_embeddings_are_mentioned_by_composed_and_decomposed_names(own: Settings, folder: Path):
    name = unicodedata.normalize("NFD", "Übermäßig")
    save_file({"emb_params": torch.zeros(2, 64)}, folder / "embeddings" / f"{name}.safetensors")

    assert list(LibrarySource(own).mentioned([unicodedata.normalize("NFC", "an ÜBERMÄẞIG cat")], {"text_encoder": 64}))


@pytest.mark.parametrize("name", ["foo (v2)", "foo [x]", "a\\b", "(((", "sub/zorb (1), 2"])
def test_an_embedding_is_reported_exactly_where_it_is_used(
    name: str, model: gouache.Model, own: Settings, folder: Path
):
    """With brackets in its name, too: as A1111, a prompt has them escaped."""
    path = folder / "embeddings" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    shutil.copy(folder / "embeddings" / "zorblax.safetensors", path)
    written = escape(path.stem)

    def paint(prompt: str, **options: object) -> tuple[torch.Tensor, list[str]]:
        picture = next(model.paint(prompt, **{**KNOBS, **options}))  # type: ignore[arg-type]
        return picture.latent, [each["name"] for each in picture.recipe["adapters"]]

    used, _ = paint("a zorblax, (zorblax:1.2) on red", negative="zorblax")
    for form in ("{}", "embedding:{}", f"embedding:{path.parent.name}/{{}}"):
        latent, names = paint(f"a {form}, ({form}:1.2) on red".format(written, written), negative=written)
        assert torch.equal(latent, used) and names == [path.stem]
    latent, names = paint(f"a {path.stem} on red")
    path.unlink()
    assert names == [] and torch.equal(latent, paint(f"a {path.stem} on red")[0])


def test_brackets_of_a_name_that_are_not_escaped_are_reported(model: gouache.Model, own: Settings, folder: Path):
    shutil.copy(folder / "embeddings" / "zorblax.safetensors", folder / "embeddings" / "foo (v2).safetensors")

    def reported(prompt: str) -> list[str]:
        mentioned = LibrarySource(own).mentioned([prompt], model.text_widths)
        return list(unescaped_names(gouache.Request(prompt=prompt), mentioned))

    assert reported("a foo (v2)") == [r"the embedding foo (v2) is not used: in a prompt its name is written foo \(v2\)"]
    assert reported(r"a foo \(v2\)") == [] and reported("a zorblax") == []


def test_of_two_embeddings_of_one_name_the_folder_decides(model: gouache.Model, own: Settings, folder: Path):
    for number, place in enumerate(("aa", "zz")):
        (folder / "embeddings" / place).mkdir()
        save_file({"emb_params": torch.full((1, 64), float(number))}, folder / "embeddings" / place / "in.safetensors")
    source = LibrarySource(own)

    for place in ("aa", "zz"):
        assert source.mentioned([f"a embedding:{place}/in"], model.text_widths)["in"].parent.name == place


def test_tags_of_a_prompt_name_files_of_the_library_and_no_paths(model: gouache.Model, folder: Path, tmp_path: Path):
    """Prompts are copied from strangers; options are written by the user."""
    outside = shutil.copy(folder / "Lora/faces/old.safetensors", tmp_path / "outside.safetensors")
    secret = tmp_path / "secret.txt"
    secret.write_text("the first bytes of a private file")
    names = [
        str(outside),
        str(secret),
        "/etc/passwd",
        "~root/.bashrc",
        "../" * 8 + "etc/passwd",
        f"{tmp_path}/./outside",
    ]
    for tag in ("lora", "lyco", "hypernet"):
        for name in names:
            with pytest.raises(RequestError) as caught:
                next(model.paint(f"a cat <{tag}:{name}:1>", **KNOBS))
            assert "tags in prompts name files of the library, not paths" in str(caught.value)
            assert caught.value.setting and str(caught.value).startswith(f"{caught.value.setting}: there is no ")
            assert "private" not in str(caught.value) and "\n" not in str(caught.value)

    by_option = next(model.paint("a cat", lora=f"{outside}:1", **KNOBS))
    by_tag = next(model.paint("a cat <lora:faces/old:1>", **KNOBS))
    assert torch.equal(by_option.latent, by_tag.latent)

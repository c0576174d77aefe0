"""`repaint`: a picture made again from its own file is identical, or possible causes of the difference are named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import gouache
from gouache.app.repaint import repaint
from gouache.app.settings import Settings
from gouache.errors import GouacheError, RequestError
from gouache.model.model import Model
from tests.adapters.loras import factors, save_kohya
from tests.pipelines import Narrow, altered

OPTIONS: dict[str, Any] = {"steps": 2, "seed": 3, "size": (64, 64), "negative": "dog"}


@pytest.fixture
def model(narrow: Callable[[str], Narrow], tmp_path: Path) -> Path:
    """A copy of a model file, which the test may change or remove."""
    return Path(shutil.copy(narrow("sd1").file, tmp_path / "model.safetensors"))


def saved(model: Path, path: Path, settings: Settings, dtype: str = "fp32", **options: Any) -> Path:
    """A picture that was painted with the file `model`, saved at `path`."""
    return next(gouache.load(model, dtype=dtype, settings=settings).paint("a cat", **OPTIONS | options)).save(path)


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The same picture with a changed recipe."""
    with Image.open(path) as opened:
        recipe, pixels = json.loads(opened.text["gouache"]), opened.convert("RGB")  # type: ignore[attr-defined]
    change(recipe)
    texts = PngInfo()
    texts.add_text("gouache", json.dumps(recipe))
    pixels.save(path, pnginfo=texts)
    return path


def with_changed_pixel(path: Path) -> Path:
    """The same file with one pixel changed by three levels."""
    with Image.open(path) as opened:
        texts = PngInfo()
        for key, text in opened.text.items():  # type: ignore[attr-defined]
            texts.add_text(key, text)
        pixels = opened.convert("RGB")
    red, green, blue = pixels.getpixel((5, 7))  # type: ignore[misc]
    pixels.putpixel((5, 7), (red, green + 3 if green < 128 else green - 3, blue))
    pixels.save(path, pnginfo=texts)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "DPM++ SDE", "schedule": "Exponential", "rng": "nv", "ensd": 31337},
        {"variation_seed": 9, "variation_strength": 0.3, "clip_skip": 2, "emphasis": "no norm", "rescale": 0.5},
        {"sampler": "DDIM", "eta": 0.7},
    ],
)
def test_an_unchanged_picture_is_identical(options: dict[str, Any], model: Path, settings: Settings, tmp_path: Path):
    again = repaint(saved(model, tmp_path / "cat.png", settings, **options), settings)

    assert again.identical and (again.share, again.largest, again.causes) == (0.0, 0, ())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_dtype_of_the_recipe_is_used(dtype: str, model: Path, settings: Settings, tmp_path: Path):
    again = repaint(saved(model, tmp_path / "cat.png", settings, dtype), settings)

    assert again.identical
    assert again.picture.recipe["dtype"] == dtype


def test_stages_that_were_upcast_are_upcast_again(model: Path, settings: Settings, tmp_path: Path):
    def enlarge(tensors: dict[str, Tensor]) -> None:
        weight = tensors["model.diffusion_model.input_blocks.0.0.weight"]
        weight *= 60000 / weight.abs().max()

    large = altered(model, tmp_path / "large.safetensors", enlarge)

    again = repaint(saved(large, tmp_path / "cat.png", settings, "fp16"), settings)

    assert again.identical and again.picture.recipe["upcast"] == ["U-Net"]


def test_a_picture_made_from_another_is_identical(model: Path, settings: Settings, tmp_path: Path):
    init = saved(model, tmp_path / "init.png", settings, seed=1)

    again = repaint(saved(model, tmp_path / "cat.png", settings, init=init, strength=0.5), settings)

    assert again.identical


def test_a_model_that_is_missing_can_be_replaced_by_the_model_option(
    model: Path, narrow: Callable[[str], Narrow], settings: Settings, tmp_path: Path
):
    picture = saved(model, tmp_path / "cat.png", settings)
    model.unlink()

    with pytest.raises(RequestError, match="model: no model 'model' has the hash"):
        repaint(picture, settings)

    assert repaint(picture, settings, model=str(narrow("sd1").file)).identical


def test_another_model_at_the_same_path_is_the_first_cause(model: Path, settings: Settings, tmp_path: Path):
    picture = saved(model, tmp_path / "cat.png", settings)
    altered(model, model, lambda tensors: tensors["first_stage_model.decoder.conv_out.bias"].add_(0.1))

    with pytest.raises(RequestError, match=r"model: .*is not a file with the recipe's hash"):
        repaint(picture, settings)

    again = repaint(picture, settings, allow_paths=True)

    assert not again.identical and again.share > 0.5
    assert again.causes[0].startswith("the model file is another: ")


def test_another_init_picture_is_the_first_cause(model: Path, settings: Settings, tmp_path: Path):
    init = saved(model, tmp_path / "init.png", settings, seed=1)
    picture = saved(model, tmp_path / "cat.png", settings, init=init, strength=0.5)
    saved(model, init, settings, seed=2)

    with pytest.raises(RequestError, match=r"init: .*init\.png is not the picture that this one was made from"):
        repaint(picture, settings)

    for again in (repaint(picture, settings, images={"init": init}), repaint(picture, settings, allow_paths=True)):
        assert not again.identical
        assert again.causes[0].startswith("the picture given as init is another: ")


def test_another_device_torch_and_batch_are_causes(model: Path, settings: Settings, tmp_path: Path):
    def change(recipe: dict[str, Any]) -> None:
        recipe["dtype"], recipe["device"], recipe["upcast"] = "bf16", "cuda", ["VAE"]
        recipe["versions"]["torch"] = "1.0"
        recipe["batch"] = 4

    picture = rewritten(saved(model, tmp_path / "cat.png", settings), change)

    again = repaint(picture, settings, device="cpu")

    assert not again.identical
    assert again.picture.recipe["upcast"] == ["VAE"]  # as in the recipe
    assert again.causes[:3] == (
        "made on cuda then, cpu now",
        f"torch 1.0 then, {torch.__version__} now",
        "made in a batch of 4, which may round differently",
    )


def test_one_changed_pixel_is_measured(model: Path, settings: Settings, tmp_path: Path):
    again = repaint(with_changed_pixel(saved(model, tmp_path / "cat.png", settings)), settings)

    assert (again.share, again.largest) == (1 / 64**2, 3)
    assert again.causes == ("the picture was changed after it was made",)


def edited(path: Path, change: Callable[[Image.Image], Image.Image]) -> Path:
    """The same file with other pixels and its texts."""
    with Image.open(path) as opened:
        texts = PngInfo()
        for key, text in opened.text.items():  # type: ignore[attr-defined]
            texts.add_text(key, text)
        pixels = opened.convert("RGB")
    change(pixels).save(path, pnginfo=texts)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.rotate(90),
        lambda image: image.convert("L").convert("RGB"),
        lambda image: image.point(lambda level: min(level + 20, 255)),
    ],
)
def test_a_picture_changed_as_a_whole_is_suspected_before_rounding(
    change: Callable[[Image.Image], Image.Image], model: Path, settings: Settings, tmp_path: Path
):
    again = repaint(edited(saved(model, tmp_path / "cat.png", settings), change), settings)

    assert again.causes[0] == "the picture was changed after it was made" and "rounding" in again.causes[1]


def test_differences_of_one_level_are_called_rounding(model: Path, settings: Settings, tmp_path: Path):
    def dither(image: Image.Image) -> Image.Image:
        levels = np.array(image).astype(int)
        levels[::7, ::5] += np.where(levels[::7, ::5] > 128, -1, 1)
        return Image.fromarray(levels.astype(np.uint8))

    again = repaint(edited(saved(model, tmp_path / "cat.png", settings), dither), settings)

    assert again.largest == 1 and len(again.causes) == 1 and "changes rounding" in again.causes[0]


@pytest.fixture
def batch(model: Path, settings: Settings, tmp_path: Path) -> list[Path]:
    """Three pictures of one batch of a model whose single pictures differ from them."""
    loaded = gouache.load(model, dtype="fp32", settings=settings)
    pictures = loaded.paint("a cat", count=5, batch=3, variation_seed=2**64 - 1, variation_strength=0.2, **OPTIONS)
    return [picture.save(tmp_path / f"{index}.png") for index, picture in enumerate(pictures)]


def test_a_picture_of_a_batch_is_compared_with_that_of_the_same_batch(
    batch: list[Path], settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    """Here another batch size is as good as another order of additions: it changes every picture by much."""
    decode = Model.decode

    def rounding(self: Model, latents: Tensor) -> Tensor:
        return decode(self, latents) * (1 + 0.1 * len(latents)) + 0.1 * torch.arange(len(latents))[:, None, None, None]

    monkeypatch.setattr(Model, "decode", rounding)
    loaded = gouache.load(batch[0].with_name("model.safetensors"), dtype="fp32", settings=settings)
    options: dict[str, Any] = {"variation_seed": 2**64 - 1, "variation_strength": 0.2, **OPTIONS}
    for picture, path in zip(loaded.paint("a cat", count=5, batch=3, **options), batch, strict=True):
        picture.save(path)

    assert all(repaint(path, settings).identical for path in batch)

    again = repaint(with_changed_pixel(batch[1]), settings)
    assert (again.share, again.largest) == (1 / 64**2, 3)
    assert again.causes == ("the picture was changed after it was made",)


@pytest.mark.parametrize(
    ("size", "index"), [(3, None), (3, 3), (3, -1), (10**9, 5), ("3", 1), (3, True), (-1, 0), ([3], 0)]
)
def test_a_batch_that_cannot_be_painted_again_is_a_cause(
    size: object, index: object, batch: list[Path], settings: Settings
):
    def change(recipe: dict[str, Any]) -> None:
        recipe.update({"batch": size, "batch_size": size, "batch_index": index})
        if index is None:  # as older versions wrote it
            del recipe["batch_index"], recipe["batch_size"]

    again = repaint(with_changed_pixel(rewritten(batch[0], change)), settings)

    assert again.causes[0] == f"made in a batch of {size}, which may round differently"


def test_the_size_of_the_batch_and_the_place_in_it_are_recorded(batch: list[Path]):
    recipes = [json.loads(Image.open(path).text["gouache"]) for path in batch]  # type: ignore[attr-defined]

    places = [(each["batch_size"], each["batch_index"]) for each in recipes]
    assert places == [(3, 0), (3, 1), (3, 2), (2, 0), (2, 1)] and all(each["batch"] == 3 for each in recipes)


def test_a_scaled_picture_is_refused(model: Path, settings: Settings, tmp_path: Path):
    picture = saved(model, tmp_path / "cat.png", settings)
    with Image.open(picture) as opened:
        texts = PngInfo()
        texts.add_text("gouache", opened.text["gouache"])  # type: ignore[attr-defined]
        half = opened.convert("RGB").resize((32, 32))
    half.save(picture, pnginfo=texts)

    with pytest.raises(RequestError, match="was cut or scaled to 32x32"):
        repaint(picture, settings)


def test_a_picture_made_from_a_value_is_refused_in_one_line(model: Path, settings: Settings, tmp_path: Path):
    """A PIL image has no file from which it could be read again."""
    init = Image.effect_noise((64, 64), 80)
    picture = saved(model, tmp_path / "cat.png", settings, init=init, strength=0.5)

    with pytest.raises(
        RequestError, match="init: was not read from a file, so it is not known; give it with --init"
    ) as caught:
        repaint(picture, settings)

    assert "\n" not in str(caught.value)


def test_a_missing_init_picture_is_refused_in_one_line(model: Path, settings: Settings, tmp_path: Path):
    init = saved(model, tmp_path / "init.png", settings, seed=1)
    picture = saved(model, tmp_path / "cat.png", settings, init=init, strength=0.5)
    init.unlink()

    with pytest.raises(RequestError, match=r"init: .*init\.png is not the picture .* was moved"):
        repaint(picture, settings)


def test_a_recipe_of_version_01_is_made_again_with_its_adapters(model: Path, settings: Settings, tmp_path: Path):
    """It has `splices`, each with `told`, where later ones have `adapters` with `setting`."""
    loaded = gouache.load(model, dtype="fp32", settings=settings)
    lora = save_kohya(tmp_path / "style.safetensors", loaded, factors(loaded))
    picture = saved(model, tmp_path / "cat.png", settings, lora=[f"{lora}:0.8"])

    def as_before(recipe: dict[str, Any]) -> None:
        (adapter,) = recipe.pop("adapters")
        adapter["told"] = adapter.pop("setting")
        recipe["splices"] = [adapter]
        for name in [name for name in recipe["request"] if name.startswith(("hires", "refiner"))]:
            del recipe["request"][name]

    again = repaint(rewritten(picture, as_before), settings)

    assert again.identical and again.picture.recipe["adapters"][0]["setting"] == f"{lora}:0.8"


@pytest.mark.parametrize("setting", ["init", "mask"])
def test_a_recipe_opens_no_picture_that_its_maker_did_not_have(
    setting: str, model: Path, settings: Settings, tmp_path: Path
):
    """Otherwise a stranger's picture, painted again with a low strength, would show the private one."""
    own, private = tmp_path / "own.png", tmp_path / "private.png"
    for path, seed in ((own, 1), (private, 2)):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    pictures = {"init": own, "mask": own}
    picture = saved(model, tmp_path / "cat.png", settings, **pictures, strength=0.5)
    digest = hashlib.sha256(private.read_bytes()).hexdigest()

    def name_the_private(recipe: dict[str, Any]) -> None:
        recipe["request"][setting] = str(private)

    hostile = rewritten(shutil.copy(picture, tmp_path / "hostile.png"), name_the_private)
    with pytest.raises(
        RequestError, match=rf"{setting}: .*private\.png is not the picture that this one was made from"
    ):
        repaint(hostile, settings)
    without = rewritten(shutil.copy(hostile, tmp_path / "without.png"), lambda recipe: recipe.update(inputs={}))
    with pytest.raises(RequestError, match="allow-paths"):
        repaint(without, settings)

    assert repaint(hostile, settings, allow_paths=True).picture.recipe["inputs"][setting] == digest
    assert repaint(hostile, settings, images={setting: own}).identical


def test_files_given_by_relative_paths_are_found_from_another_folder(
    model: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A file of the same name in the other folder is not used in their place."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, level in ((here, 200), (there, 20)):
        folder.mkdir()
        Image.new("RGB", (64, 64), (level, 100, 50)).save(folder / "init.png")
    shutil.copy(model, here / "model.safetensors")
    lora = save_kohya(here / "style.safetensors", (loaded := gouache.load(model, settings=settings)), factors(loaded))
    monkeypatch.chdir(here)
    picture = saved(
        Path("model.safetensors"), Path("cat.png"), settings, init="init.png", strength=0.5, lora=[lora.name]
    ).absolute()
    monkeypatch.chdir(there)

    assert repaint(picture, settings).identical
    # Moved together with the picture that it was made from.
    (here / "init.png").rename(there / "init.png")
    assert repaint(picture.rename(there / "cat.png"), settings).identical


HOSTILE: list[Callable[[dict[str, Any]], object]] = [
    lambda recipe: recipe["request"].update(steps="many"),
    lambda recipe: recipe["request"].update(init=["a"]),
    lambda recipe: recipe["request"].update(size=[64]),
    lambda recipe: recipe["request"].update(unknown="setting"),
    lambda recipe: recipe.update(dtype="int4"),
    lambda recipe: recipe.update(device="abacus"),
    lambda recipe: recipe["model"].update(prediction="future"),
    lambda recipe: recipe["model"].update(family="royal"),
    lambda recipe: recipe["model"].update(path="/etc/hostname"),
    lambda recipe: recipe["model"].update(path="\0", name="\0"),
    lambda recipe: recipe.pop("model"),
    lambda recipe: recipe["model"].clear(),
    lambda recipe: recipe["request"].update(hires="large"),
    lambda recipe: recipe["request"].update(refiner="/etc/hostname", refiner_at=0.1, steps=4),
    lambda recipe: recipe["request"].update(lora=["/etc/hostname"]),
    lambda recipe: recipe.update(splices=[{"told": "a"}, 5]),
    lambda recipe: recipe["model"].update(path="a" * 5000, name="a" * 5000),
    lambda recipe: recipe.update(adapters=[{"kind": "lora", "setting": "", "path": "a" * 5000, "name": "a"}]),
    lambda recipe: recipe.update(inputs={"prompt": "abc"}),
    lambda recipe: recipe.update(inputs={"init": None}),
    lambda recipe: recipe["request"].update(hires=2.0, hires_strength=1e-300),
]


@pytest.mark.parametrize("change", HOSTILE, ids=range(len(HOSTILE)))
def test_a_manipulated_recipe_is_refused_in_one_line(
    change: Callable[[dict[str, Any]], object], model: Path, settings: Settings, tmp_path: Path
):
    picture = rewritten(saved(model, tmp_path / "cat.png", settings, steps=1), change)

    with pytest.raises(GouacheError) as caught:
        repaint(picture, settings)

    assert "\n" not in str(caught.value)

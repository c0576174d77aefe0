"""The metadata of a saved picture: the recipe as JSON, and the parameters in A1111's format, parsed independently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import gouache
from gouache import Model, Picture
from gouache.errors import FileError, RequestError
from gouache.generate import infotext
from gouache.generate.picture import read_recipe
from gouache.generate.request import Request

Models = Callable[[str], Model]


def parsed(text: str) -> tuple[str, str, dict[str, str]]:
    """(prompt, negative, fields) of A1111's text: fields on the last line, the negative after its heading."""
    prompts, _, rest = text.rpartition("\n")
    fields: dict[str, str] = {}
    while rest:
        key, rest = rest.split(": ", 1)
        if rest.startswith('"'):
            fields[key], end = json.JSONDecoder().raw_decode(rest)
            rest = rest[end:].removeprefix(", ")
        else:
            fields[key], _, rest = rest.partition(", ")
    prompt, _, negative = prompts.partition("\nNegative prompt: ")
    return prompt, negative, fields


def paint(model: Model, prompt: str = "a cat", **options: Any) -> Picture:
    return next(model.paint(prompt, **{"steps": 1, "seed": 5, "size": (64, 64)} | options))


def png_texts(path: Path) -> dict[str, str]:
    with Image.open(path) as opened:
        return dict(opened.text)  # type: ignore[attr-defined]


names = st.text(
    st.sampled_from('aZ1,:"\\ é'), max_size=12
)  # of model files, with every character that separates fields
words = st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=30)


@given(
    prompt=words,
    negative=words,
    cfg=st.floats(0, 1000),
    steps=st.integers(1, 1000),
    model=names,
    variation=st.none() | st.tuples(st.integers(0, 2**64 - 1), st.floats(0.001, 1)),
    clip_skip=st.none() | st.integers(1, 12),
    eta=st.none() | st.floats(0, 1),
)
def test_every_setting_can_be_read_from_the_parameters(prompt, negative, cfg, steps, model, variation, clip_skip, eta):
    request = Request(
        prompt=prompt,
        negative=negative,
        cfg=cfg,
        steps=steps,
        clip_skip=clip_skip,
        eta=eta,
        variation_seed=variation[0] if variation else None,
        variation_strength=variation[1] if variation else 0.0,
        size=(640, 512),
    )

    text = infotext.write(request, 2**64 - 1, "DPM++ 2M", "Karras", {"Model": model})

    *prompts, fields = parsed(text)
    assert prompts == [prompt, negative]
    assert fields["Steps"] == str(steps) and float(fields["CFG scale"]) == cfg
    assert (fields["Sampler"], fields["Schedule type"]) == ("DPM++ 2M", "Karras")
    assert (fields["Seed"], fields["Size"], fields["Model"]) == (str(2**64 - 1), "640x512", model)
    assert fields.get("Clip skip") == (None if clip_skip is None else str(clip_skip))
    assert (float(fields["Eta"]) if "Eta" in fields else None) == eta
    if variation:
        found = int(fields["Variation seed"]), float(fields["Variation seed strength"])
        assert found == variation


def test_the_parameters_are_those_that_a1111_writes():
    request = Request(prompt="a cat\non a mat", negative="dog", steps=20, cfg=7.0, size=(512, 768))

    text = infotext.write(request, 5, "Euler a", "Uniform", {"Model hash": "0123456789", "Model": "mini"})

    assert text == (
        "a cat\non a mat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, Schedule type: Uniform, CFG scale: 7, "
        "Seed: 5, Size: 512x768, RNG: CPU, Model hash: 0123456789, Model: mini"
    )


def test_the_parameters_of_hires_fix_and_a_refiner_are_those_that_a1111_writes():
    """As in A1111 1.10: sampler, schedule and prompts of the second pass only where they differ from the first."""
    request = Request(
        prompt="a cat", steps=20, size=(512, 768), hires=2.0, hires_steps=10, hires_strength=0.55,
        hires_upscaler="nearest-exact", hires_prompt="a cat, sharp", hires_negative="blurry", refiner="refiner",
        refiner_at=0.8,
    )  # fmt: skip

    text = infotext.write(
        request, 5, "Euler", "Karras", {}, hires=("Euler a", "Uniform"), refiner="refiner [0123456789]"
    )

    assert text == (
        "a cat\nSteps: 20, Sampler: Euler, Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 512x768, Denoising "
        "strength: 0.55, Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent (nearest-exact), Hires sampler: "
        'Euler a, Hires schedule type: Uniform, Hires prompt: "a cat, sharp", Hires negative prompt: blurry, '
        "Refiner: refiner [0123456789], Refiner switch at: 0.8, RNG: CPU"
    )
    plain = Request(prompt="a cat", size=(512, 768), hires=(1024, 1536))
    fields = parsed(infotext.write(plain, 5, "Euler", "Karras", {}, hires=("Euler", "Karras")))[2]
    hires = {name: value for name, value in fields.items() if name.startswith("Hires")}
    assert hires == {"Hires resize": "1024x1536", "Hires upscaler": "Latent"}
    assert fields["Denoising strength"] == "0.7"


def test_a_saved_picture_contains_its_recipe_and_its_parameters(loaded: Models, tmp_path: Path):
    model = loaded("sd1")
    options: dict[str, Any] = {"sampler": "k_euler_a", "negative": "dog", "cfg": 4.5, "clip_skip": 2, "eta": 0.5}
    picture = paint(model, "a (red:1.2) cat, 猫", **options)

    path = picture.save(tmp_path / "new" / "cat.png")

    texts = png_texts(path)
    recipe = json.loads(texts["gouache"])
    assert recipe == picture.recipe and texts["parameters"] == picture.parameters
    assert recipe["request"] == {
        **Request.from_json(options | {"prompt": "a (red:1.2) cat, 猫", "seed": 5, "steps": 1}).to_json(),
        "sampler": "Euler a",
        "schedule": "Uniform",
        "size": "64x64",
    }
    used = recipe["model"]
    assert (used["family"], used["variant"], used["prediction"]) == ("sd1", "base", "eps")
    assert used["sha256"] == model.file.sha256() and Path(used["path"]) == model.file.path
    assert (recipe["device"], recipe["dtype"], recipe["upcast"]) == ("cpu", "fp32", [])
    assert recipe["versions"]["gouache"] == gouache.__version__ and recipe["versions"]["torch"] == torch.__version__
    prompt, negative, fields = parsed(texts["parameters"])
    assert (prompt, negative, fields["Sampler"]) == ("a (red:1.2) cat, 猫", "dog", "Euler a")
    assert fields["Model hash"] == used["sha256"][:10]


def test_each_recipe_of_a_series_is_for_a_single_picture(loaded: Models):
    request = Request(
        prompt="a cat", seed=5, steps=1, count=3, batch=2, size=(64, 64), variation_seed=70, variation_strength=0.2
    )

    recipes = [picture.recipe for picture in loaded("sd1").paint(request)]

    for index, recipe in enumerate(recipes):
        settings = recipe["request"]
        assert (settings["seed"], settings["variation_seed"]) == (5 + index, 70 + index)
        assert (settings["count"], settings["batch"], recipe["batch"]) == (1, 1, 2)


def test_the_request_of_a_recipe_paints_the_same_picture(loaded: Models, tmp_path: Path):
    model = loaded("sd1")
    path = list(model.paint("a cat", seed=5, steps=2, count=2, size=(64, 96), sampler="DPM++ SDE"))[1].save(
        tmp_path / "a"
    )
    recipe, image = read_recipe(path)

    again = next(model.paint(Request.from_json(recipe["request"])))

    assert path.name == "a.png"
    assert again.image.tobytes() == image.tobytes()


def test_saving_replaces_a_file_and_leaves_no_other(loaded: Models, tmp_path: Path):
    target = tmp_path / "cat.png"
    target.write_bytes(b"an older picture")

    paint(loaded("sd1")).save(target)

    assert [path.name for path in tmp_path.iterdir()] == ["cat.png"]
    assert Image.open(target).size == (64, 64)


@pytest.mark.parametrize("name", ["cat.jpg", "cat.webp", "cat.v2"])
def test_another_format_is_refused(name: str, loaded: Models, tmp_path: Path):
    with pytest.raises(RequestError, match=r"output: .* does not end in \.png"):
        paint(loaded("sd1")).save(tmp_path / name)

    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_created_is_reported(loaded: Models, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")

    with pytest.raises(FileError, match="cannot be created as a folder for pictures"):
        paint(loaded("sd1")).save(tmp_path / "file" / "cat.png")


def png(path: Path, texts: dict[str, str]) -> Path:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


DAMAGED = [
    "{", "[]", "5", "{}", '{"request": []}', '{"request": {}, "model": 7}', '{"request": {}, "model": {"name": []}}',
    '{"request": {}, "inputs": []}', '{"request": {}, "versions": {"torch": 2}}', '{"request": {}, "upcast": "VAE"}',
    '{"request": {}, "upcast": [1]}', '{"request": {}, "device": {}}', '{"request": {}, "dtype": 16}', "[" * 100_000,
    '{"request": {}, "adapters": {}}', '{"request": {}, "adapters": [5]}', '{"request": {}, "adapters": [{"path": 5}]}',
    '{"request": {}, "splices": 5}', '{"request": {}, "splices": [{"told": []}]}', '{"request": {}, "refiner": []}',
]  # fmt: skip


@pytest.mark.parametrize("recipe", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_recipe_is_refused(recipe: str, tmp_path: Path):
    with pytest.raises(RequestError, match="its recipe is damaged"):
        read_recipe(png(tmp_path / "a.png", {"gouache": recipe}))


def test_a_recipe_of_version_01_is_read(tmp_path: Path):
    """It has `splices`, each with `told`, where later ones have `adapters` with `setting`."""
    file = {"kind": "lora", "name": "style", "told": "style:0.8", "path": "/models/style.safetensors", "sha256": "00"}
    old = {"request": {"prompt": "a cat"}, "splices": [file]}

    recipe, _ = read_recipe(png(tmp_path / "a.png", {"gouache": json.dumps(old)}))

    (adapter,) = recipe["adapters"]
    assert "splices" not in recipe
    assert {name: adapter[name] for name in ("kind", "name", "setting", "path", "sha256")} == {
        "kind": "lora", "name": "style", "setting": "style:0.8", "path": "/models/style.safetensors", "sha256": "00"
    }  # fmt: skip


def test_a_picture_without_a_recipe_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match=r"has no recipe by Gouache$"):
        read_recipe(png(tmp_path / "a.png", {}))
    with pytest.raises(RequestError, match="it has the parameters of another program"):
        read_recipe(png(tmp_path / "b.png", {"parameters": "a cat\nSteps: 20"}))


def test_a_file_that_is_not_a_png_is_refused(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("a.jpg", "b.png"):
        with pytest.raises(RequestError, match="is not a PNG that can be read"):
            read_recipe(tmp_path / name)
    with pytest.raises(RequestError, match="there is no file"):
        read_recipe(tmp_path / "c.png")

"""What a picture's file says of how it was painted: the recipe as JSON, and A1111's text, read here by other means."""

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
    said, _, rest = text.rpartition("\n")
    fields: dict[str, str] = {}
    while rest:
        key, rest = rest.split(": ", 1)
        if rest.startswith('"'):
            fields[key], end = json.JSONDecoder().raw_decode(rest)
            rest = rest[end:].removeprefix(", ")
        else:
            fields[key], _, rest = rest.partition(", ")
    prompt, _, negative = said.partition("\nNegative prompt: ")
    return prompt, negative, fields


def painted(model: Model, prompt: str = "a cat", **knobs: Any) -> Picture:
    return next(model.paint(prompt, **{"steps": 1, "seed": 5, "size": (64, 64)} | knobs))


def png_texts(path: Path) -> dict[str, str]:
    with Image.open(path) as opened:
        return dict(opened.text)  # type: ignore[attr-defined]


names = st.text(st.sampled_from('aZ1,:"\\ é'), max_size=12)  # of model files: with all that parts the fields
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
def test_the_parameters_text_gives_every_knob_back(prompt, negative, cfg, steps, model, variation, clip_skip, eta):
    request = Request(
        prompt=prompt,
        negative=negative,
        cfg=cfg,
        steps=steps,
        clip_skip=clip_skip,
        eta=eta,
        variation_seed=variation[0] if variation else None,
        variation_strength=variation[1] if variation else 0.0,
    )

    text = infotext.write(request, 2**64 - 1, (640, 512), "DPM++ 2M", "Karras", {"Model": model})

    said, unwanted, fields = parsed(text)
    assert (said, unwanted) == (prompt, negative)
    assert fields["Steps"] == str(steps) and float(fields["CFG scale"]) == cfg
    assert (fields["Sampler"], fields["Schedule type"]) == ("DPM++ 2M", "Karras")
    assert (fields["Seed"], fields["Size"], fields["Model"]) == (str(2**64 - 1), "640x512", model)
    assert fields.get("Clip skip") == (None if clip_skip is None else str(clip_skip))
    assert (float(fields["Eta"]) if "Eta" in fields else None) == eta
    if variation:
        found = int(fields["Variation seed"]), float(fields["Variation seed strength"])
        assert found == variation


def test_a_usual_picture_reads_as_a1111_writes_it():
    request = Request(prompt="a cat\non a mat", negative="dog", steps=20, cfg=7.0)

    text = infotext.write(request, 5, (512, 768), "Euler a", "Uniform", {"Model hash": "0123456789", "Model": "mini"})

    assert text == (
        "a cat\non a mat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, Schedule type: Uniform, CFG scale: 7, "
        "Seed: 5, Size: 512x768, RNG: CPU, Model hash: 0123456789, Model: mini"
    )


def test_a_saved_picture_carries_its_recipe_and_its_parameters(loaded: Models, tmp_path: Path):
    model = loaded("sd1")
    knobs: dict[str, Any] = {"sampler": "k_euler_a", "negative": "dog", "cfg": 4.5, "clip_skip": 2, "eta": 0.5}
    picture = painted(model, "a (red:1.2) cat, 猫", **knobs)

    path = picture.save(tmp_path / "new" / "cat.png")

    texts = png_texts(path)
    recipe = json.loads(texts["gouache"])
    assert recipe == picture.recipe and texts["parameters"] == picture.parameters
    assert recipe["request"] == {
        **Request.from_json(knobs | {"prompt": "a (red:1.2) cat, 猫", "seed": 5, "steps": 1}).to_json(),
        "sampler": "Euler a",
        "schedule": "Uniform",
        "size": "64x64",
    }
    told = recipe["model"]
    assert (told["family"], told["variant"], told["prediction"]) == ("sd1", "base", "eps")
    assert told["sha256"] == model.file.sha256() and Path(told["path"]) == model.file.path
    assert (recipe["device"], recipe["dtype"], recipe["upcast"]) == ("cpu", "fp32", [])
    assert recipe["versions"]["gouache"] == gouache.__version__ and recipe["versions"]["torch"] == torch.__version__
    said, unwanted, fields = parsed(texts["parameters"])
    assert (said, unwanted, fields["Sampler"]) == ("a (red:1.2) cat, 猫", "dog", "Euler a")
    assert fields["Model hash"] == told["sha256"][:10]


def test_every_picture_of_a_series_has_the_recipe_of_itself_alone(loaded: Models):
    model = loaded("sd1")
    knobs: dict[str, Any] = {"variation_seed": 70, "variation_strength": 0.2}

    series = [
        picture.recipe for picture in model.paint("a cat", seed=5, steps=1, count=3, batch=2, size=(64, 64), **knobs)
    ]

    for index, recipe in enumerate(series):
        asked = recipe["request"]
        assert (asked["seed"], asked["variation_seed"]) == (5 + index, 70 + index)
        assert (asked["count"], asked["batch"], recipe["batch"]) == (1, 1, 2)


def test_a_recipe_is_a_request_that_paints_the_same_picture(loaded: Models, tmp_path: Path):
    model = loaded("sd1")
    path = list(model.paint("a cat", seed=5, steps=2, count=2, size=(64, 96), sampler="DPM++ SDE"))[1].save(
        tmp_path / "a"
    )
    recipe, image = read_recipe(path)

    again = next(model.paint(Request.from_json(recipe["request"])))

    assert path.name == "a.png"
    assert again.image.tobytes() == image.tobytes()


def test_saving_replaces_whole_and_leaves_nothing_beside(loaded: Models, tmp_path: Path):
    target = tmp_path / "cat.png"
    target.write_bytes(b"an older picture")

    painted(loaded("sd1")).save(target)

    assert [path.name for path in tmp_path.iterdir()] == ["cat.png"]
    assert Image.open(target).size == (64, 64)


@pytest.mark.parametrize("name", ["cat.jpg", "cat.webp", "cat.v2"])
def test_another_format_is_refused(name: str, loaded: Models, tmp_path: Path):
    with pytest.raises(RequestError, match=r"output: .* does not end in \.png"):
        painted(loaded("sd1")).save(tmp_path / name)

    assert not any(tmp_path.iterdir())


def test_a_file_in_the_way_of_the_folder_is_named(loaded: Models, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")

    with pytest.raises(FileError, match="cannot be made a folder"):
        painted(loaded("sd1")).save(tmp_path / "file" / "cat.png")


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
]  # fmt: skip


@pytest.mark.parametrize("recipe", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_recipe_is_called_so(recipe: str, tmp_path: Path):
    with pytest.raises(RequestError, match="its recipe is damaged"):
        read_recipe(png(tmp_path / "a.png", {"gouache": recipe}))


def test_a_picture_without_a_recipe_is_told_from_another_programs(tmp_path: Path):
    with pytest.raises(RequestError, match=r"holds no recipe of Gouache's$"):
        read_recipe(png(tmp_path / "a.png", {}))
    with pytest.raises(RequestError, match="it holds another program's parameters"):
        read_recipe(png(tmp_path / "b.png", {"parameters": "a cat\nSteps: 20"}))


def test_what_is_no_png_is_refused(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("a.jpg", "b.png"):
        with pytest.raises(RequestError, match="is not a PNG that can be read"):
            read_recipe(tmp_path / name)
    with pytest.raises(RequestError, match="there is no file"):
        read_recipe(tmp_path / "c.png")

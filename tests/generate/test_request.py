"""`Request`: values that are refused, sizes as text, pictures as values, and the way to JSON and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gouache.errors import RequestError
from gouache.generate.request import UPSCALERS, Request, parse_size
from gouache.images.input_image import InputImage

WRONG: list[tuple[str, Any]] = [
    ("steps", 0), ("steps", 1001), ("steps", 2.5), ("steps", "20"), ("steps", True), ("steps", None),
    ("cfg", -1), ("cfg", float("nan")), ("cfg", float("inf")), ("cfg", "7"),
    ("seed", -2), ("seed", 2**64), ("seed", 1.5), ("seed", "1"),
    ("count", 0), ("batch", 0), ("batch", 1025), ("count", 1.0),
    ("clip_skip", 0), ("clip_skip", 49), ("strength", 1.01), ("strength", -0.1),
    ("variation_strength", 2), ("variation_seed", -5), ("rescale", 1.5), ("image_cfg", -1), ("eta", -1),
    ("ensd", 0.5), ("rng", "gpu"), ("emphasis", "loud"),
    ("size", (64, 60)), ("size", (0, 64)), ("size", (64, 20000)), ("size", [64]), ("size", [64.0, 64]),
    ("size", "wide"), ("size", 64), ("size", [64, 64, 64]),
    ("prompt", 5), ("negative", None), ("sampler", ["Euler"]), ("schedule", None),
    ("init", 7), ("mask", ["a.png"]), ("depth", True), ("init", "absent.png"), ("init", b"no picture"),
    ("hires", 0.5), ("hires", 17), ("hires", "big"), ("hires", (64, 60)), ("hires", True), ("hires_steps", 0),
    ("hires_strength", 1.1), ("hires_upscaler", "bilinear"), ("hires_sampler", 5), ("hires_schedule", 5),
    ("hires_prompt", None), ("refiner", 5), ("refiner_at", -0.1), ("vae", 5), ("lora", 5), ("lora", [5]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_an_invalid_value_is_refused_with_the_name_of_its_setting(name: str, value: Any):
    with pytest.raises(RequestError) as caught:
        Request.from_json({"prompt": "a cat", name: value})

    assert caught.value.setting == name
    assert "\n" not in str(caught.value)


def test_an_unknown_setting_is_refused_with_the_list_of_known_ones():
    with pytest.raises(RequestError, match=r"stepss: is not a setting; known are .*, steps, "):
        Request.from_json({"stepss": 5})


def test_a_mask_needs_a_picture():
    with pytest.raises(RequestError, match="mask: needs a picture"):
        Request(mask=Image.new("L", (8, 8)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("640x512", (640, 512)),
        ("640X512", (640, 512)),
        (" 640 × 512 ", (640, 512)),
        ("64*32", (64, 32)),
        ("96", (96, 96)),
    ],
)
def test_sizes_are_read_from_text(text: str, size: tuple[int, int]):
    assert parse_size(text) == size


PICTURES = [
    InputImage(Image.new("RGB", (8, 8)), "01" * 32, Path("a.png")),
    InputImage(Image.new("L", (16, 8)), "23" * 32, Path("/b/c d.png")),
]

requests = st.builds(
    Request,
    prompt=st.text(max_size=40),
    negative=st.text(max_size=40),
    steps=st.integers(1, 1000),
    cfg=st.floats(0, 1000),
    seed=st.none() | st.integers(0, 2**64 - 1),
    size=st.none() | st.tuples(*[st.integers(1, 2048).map(lambda eighth: eighth * 8)] * 2),
    count=st.integers(1, 100_000),
    batch=st.integers(1, 1024),
    clip_skip=st.none() | st.integers(1, 48),
    emphasis=st.sampled_from(["original", "no norm", "ignore", "none", "comfy"]),
    init=st.none() | st.sampled_from(PICTURES),
    hires=st.none() | st.floats(1, 16) | st.tuples(*[st.integers(1, 2048).map(lambda eighth: eighth * 8)] * 2),
    hires_steps=st.none() | st.integers(1, 1000),
    hires_strength=st.floats(0, 1),
    hires_upscaler=st.sampled_from(UPSCALERS),
    hires_schedule=st.none() | st.sampled_from(["Karras", "Uniform"]),
    hires_prompt=st.text(max_size=10),
    refiner=st.none() | st.sampled_from(["refiner", "/models/refiner.safetensors"]),
    refiner_at=st.floats(0, 1),
    lora=st.lists(st.sampled_from(["a:1", "b:0.5:te=1"]), max_size=2),
    strength=st.floats(0, 1),
    variation_seed=st.none() | st.integers(0, 2**64 - 1),
    variation_strength=st.floats(0, 1),
    rng=st.sampled_from(["cpu", "nv"]),
    eta=st.none() | st.floats(0, 100),
    ensd=st.integers(-(2**31), 2**31),
    rescale=st.floats(0, 1),
)


@given(requests)
def test_a_request_survives_the_way_to_json_and_back(request_: Request):
    """A picture by its path; reading the file again is `input_image`'s part."""
    values = json.loads(json.dumps(request_.to_json()))
    if request_.init is not None:
        assert values["init"] == str(request_.init.path)
        values["init"] = request_.init

    assert Request.from_json(values) == request_


def test_a_missing_seed_is_replaced_by_a_random_one():
    assert Request(seed=7).settled().seed == 7
    seeds = {Request().settled().seed for _ in range(8)}
    assert len(seeds) == 8 and all(seed is not None and 0 <= seed < 2**32 for seed in seeds)


def test_a_picture_is_opened_once_when_the_request_is_made(tmp_path: Path):
    path = tmp_path / "init.png"
    Image.new("RGB", (16, 8), "red").save(path)

    request = Request(init=str(path))  # type: ignore[arg-type]
    path.unlink()

    assert request.init is not None and (request.init.size, request.init.path) == ((16, 8), path)
    assert request.settled().init is request.init and request.to_json()["init"] == str(path)


def test_other_settings_of_a_request_are_changed_by_name():
    request = Request(prompt="a cat", size=(64, 96), hires=1.5, lora=("a:1",))

    changed = request.changed({"size": "128x64", "hires": "256x128", "lora": "b"})

    assert (changed.prompt, changed.size, changed.hires, changed.lora) == ("a cat", (128, 64), (256, 128), ("b",))
    with pytest.raises(RequestError, match="stepss: is not a setting"):
        request.changed({"stepss": 5})

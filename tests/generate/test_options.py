"""The keyword arguments of `Model.paint` are the fields of `Request`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gouache
from gouache.app.settings import Settings
from gouache.errors import RequestError
from gouache.files.metadata import write_metadata
from gouache.generate.request import Options, Request
from recipes.mini import bundle
from tests.pipelines import Narrow


def test_the_options_are_the_fields_of_a_request_except_its_prompt():
    assert Options.__annotations__.keys() == {each.name for each in fields(Request)} - {"prompt"}


def test_a_request_can_be_changed_by_options():
    request = Request(prompt="a cat", steps=7, size=(64, 64))

    changed = request.changed({"steps": 9, "hires": "2"})

    assert (changed.prompt, changed.steps, changed.size, changed.hires) == ("a cat", 9, (64, 64), 2.0)
    assert request.steps == 7


def test_sizes_are_checked_however_a_request_is_made():
    assert Request(size="64x72", hires="96x104").to_json()["hires"] == "96x104"  # type: ignore[arg-type]
    assert Request(size=[64, 72]).size == (64, 72)  # type: ignore[arg-type]
    for size in (64, (64,), ("64", "64"), (64, 64, 64), (64.0, 64)):
        with pytest.raises(RequestError, match="size"):
            Request(size=size)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="hires: 262144x262144"):
        Request(hires=16).hires_size((16384, 16384))


def test_numpy_numbers_and_minus_one_are_read():
    request = Request(seed=np.int64(5), steps=np.int64(7), cfg=np.float32(2.5), variation_seed=-1)  # type: ignore[arg-type]

    assert (request.seed, request.steps, request.cfg, request.variation_seed) == (5, 7, 2.5, None)
    assert type(request.seed) is int and type(request.cfg) is float
    assert Request(seed=-1).seed is None and Request(seed=-1).settled().seed is not None
    assert Request(seed=1, variation_strength=0.5).settled().variation_seed is not None


@pytest.mark.parametrize(
    ("stated", "expected"), [("3", 3.0), ("1.5", 1.5), ("", 7.0), ("x", 7.0), ("nan", 7.0), ("-1", 7.0), ("1e999", 7.0)]
)
def test_the_guidance_scale_is_the_models_own_by_default(
    stated: str, expected: float, narrow: Callable[[str], Narrow], settings: Settings, tmp_path: Path
):
    path = tmp_path / "model.safetensors"
    write_metadata(narrow("sd1").file, path, {"gouache.cfg": stated})
    model = gouache.load(path, dtype="fp32", settings=settings)
    options: dict[str, Any] = {"steps": 2, "size": (64, 64), "seed": 3}

    picture = next(model.paint("a cat", **options))
    explicit = next(model.paint("a cat", cfg=expected, **options))
    other = next(model.paint("a cat", cfg=5, **options))

    assert torch.equal(picture.latent, explicit.latent) and not torch.equal(picture.latent, other.latent)
    assert picture.recipe["request"]["cfg"] == expected and f"CFG scale: {expected:g}," in picture.parameters
    assert other.recipe["request"]["cfg"] == 5


def test_the_embedded_model_states_its_guidance_scale(settings: Settings):
    model = gouache.load(settings=settings)

    assert model.cfg == 4 and dict(model.file.metadata) == bundle.metadata()


@pytest.mark.parametrize("text", ["caf\udce9", "\ud800"])
def test_text_that_cannot_be_saved_is_refused(text: str):
    for name in ("prompt", "negative", "hires_prompt", "hires_negative"):
        with pytest.raises(RequestError, match=f"{name}: has bytes that are not text"):
            Request(**{name: text})

"""The keyword arguments of `Model.paint` are the fields of `Request`."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from gouache.errors import RequestError
from gouache.generate.request import Options, Request


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


@pytest.mark.parametrize("text", ["caf\udce9", "\ud800"])
def test_text_that_cannot_be_saved_is_refused(text: str):
    for name in ("prompt", "negative", "hires_prompt", "hires_negative"):
        with pytest.raises(RequestError, match=f"{name}: has bytes that are not text"):
            Request(**{name: text})

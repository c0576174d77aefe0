"""A request refuses what cannot be painted, setting by setting, and survives its way through JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gouache.errors import RequestError
from gouache.generate.request import Request, parse_size

WRONG: list[tuple[str, Any]] = [
    ("steps", 0), ("steps", 1001), ("steps", 2.5), ("steps", "20"), ("steps", True), ("steps", None),
    ("cfg", -1), ("cfg", float("nan")), ("cfg", float("inf")), ("cfg", "7"),
    ("seed", -1), ("seed", 2**64), ("seed", 1.5), ("seed", "1"),
    ("count", 0), ("batch", 0), ("batch", 1025), ("count", 1.0),
    ("clip_skip", 0), ("clip_skip", 49), ("strength", 1.01), ("strength", -0.1),
    ("variation_strength", 2), ("variation_seed", -5), ("rescale", 1.5), ("image_cfg", -1), ("eta", -1),
    ("ensd", 0.5), ("rng", "gpu"), ("emphasis", "loud"),
    ("size", (64, 60)), ("size", (0, 64)), ("size", (64, 20000)), ("size", [64]), ("size", [64.0, 64]),
    ("size", "wide"), ("size", 64), ("size", [64, 64, 64]),
    ("prompt", 5), ("negative", None), ("sampler", ["Euler"]), ("schedule", None),
    ("init", 7), ("mask", ["a.png"]), ("depth", True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_that_cannot_be_used_is_refused_by_the_name_of_its_setting(name: str, value: Any):
    with pytest.raises(RequestError) as caught:
        Request.from_json({"prompt": "a cat", name: value})

    assert caught.value.setting == name
    assert "\n" not in str(caught.value)


def test_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(RequestError, match=r"stepss: is not a setting; there are .*, steps, "):
        Request.from_json({"stepss": 5})


def test_a_mask_needs_a_picture():
    with pytest.raises(RequestError, match="mask: needs a picture"):
        Request(mask=Path("mask.png"))


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
def test_sizes_as_people_write_them(text: str, size: tuple[int, int]):
    assert parse_size(text) == size


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
    emphasis=st.sampled_from(["original", "no norm", "ignore"]),
    init=st.none() | st.sampled_from([Path("a.png"), Path("/b/c d.png")]),
    strength=st.floats(0, 1),
    variation_seed=st.none() | st.integers(0, 2**64 - 1),
    variation_strength=st.floats(0, 1),
    rng=st.sampled_from(["cpu", "nv"]),
    eta=st.none() | st.floats(0, 100),
    ensd=st.integers(-(2**31), 2**31),
    rescale=st.floats(0, 1),
)


@given(requests)
def test_every_request_comes_back_from_json_as_it_was(request_: Request):
    assert Request.from_json(json.loads(json.dumps(request_.to_json()))) == request_


def test_a_seed_is_drawn_once_where_none_is_given():
    assert Request(seed=7).settled().seed == 7
    drawn = {Request().settled().seed for _ in range(8)}
    assert len(drawn) == 8 and all(seed is not None and 0 <= seed < 2**32 for seed in drawn)

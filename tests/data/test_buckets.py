"""Buckets and crops, compared with definitions by brute force and with sizes that the field knows."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gouache.data.buckets import Buckets, cover
from gouache.errors import RequestError

SIDES = st.integers(8, 4000)


def all_sizes(area: int, step: int, low: int, high: int) -> set[tuple[int, int]]:
    """Every size that cannot grow by a step along one of its sides."""
    sides = [side for side in range(step, high + 1, step) if side >= low]

    def fits(width: int, height: int) -> bool:
        return width * height <= area and width <= high and height <= high

    return {
        (width, height)
        for width in sides
        for height in sides
        if fits(width, height) and not (fits(width + step, height) and fits(width, height + step))
    }


@pytest.mark.parametrize(
    ("resolution", "step", "low", "high"),
    [((512, 512), 64, 256, 1024), ((1024, 1024), 64, 512, 2048), ((64, 64), 8, 32, 128), ((768, 512), 64, 313, 1254)],
)
def test_sizes_are_all_that_cannot_grow_along_one_side(resolution, step, low, high):
    assert set(Buckets(resolution, step).sizes) == all_sizes(math.prod(resolution), step, low, high)


def test_sizes_are_those_of_sdxl():
    known = {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (1344, 768), (1536, 640), (640, 1536)}

    assert known <= set(Buckets((1024, 1024)).sizes)


@given(width=SIDES, height=SIDES)
def test_the_size_that_loses_least_is_chosen_and_covered(width: int, height: int):
    buckets = Buckets((512, 512))

    crop = buckets.crop((width, height))

    def kept(size: tuple[int, int]) -> float:
        ratio = (width / height) / (size[0] / size[1])
        return min(ratio, 1 / ratio)

    # One row of pixels is what rounding can lose.
    assert 1 - crop.lost >= max(kept(size) for size in buckets.sizes) - 1 / 256
    assert crop.scaled[0] == crop.size[0] or crop.scaled[1] == crop.size[1]
    assert crop.room[0] >= 0 and crop.room[1] >= 0
    assert crop.offset == (crop.room[0] // 2, crop.room[1] // 2)
    if min(kept(crop.size) * side for side in crop.size) > 64:  # otherwise the size's limits decide
        scale = max(crop.size[0] / width, crop.size[1] / height)
        assert abs(crop.scaled[0] - width * scale) <= 0.5 and abs(crop.scaled[1] - height * scale) <= 0.5


@given(width=SIDES, height=SIDES)
def test_without_enlarging_a_picture_keeps_its_pixels(width: int, height: int):
    buckets = Buckets((512, 512), upscale=False)

    crop = buckets.crop((width, height))

    assert crop.size[0] % 64 == crop.size[1] % 64 == 0
    assert max(crop.size) <= 1024
    assert crop.size[0] * crop.size[1] <= 512 * 512
    assert buckets.crop((height, width)).size == (crop.size if width == height else crop.size[::-1])
    if min(width, height) >= 64:
        assert crop.size[0] <= width and crop.size[1] <= height
        assert crop.enlarged <= 1


def test_without_enlarging_a_narrow_picture_keeps_what_it_can():
    crop = Buckets((512, 512), upscale=False).crop((2000, 200))

    assert (crop.size, crop.scaled) == ((1024, 128), (1280, 128))
    assert Buckets((512, 512), upscale=False).crop((3000, 2000)) == Buckets((512, 512)).crop((3000, 2000))


def test_a_square_gets_the_largest_square_and_portraits_mirror_landscapes():
    buckets = Buckets((512, 512))

    assert buckets.crop((1000, 1000)).size == (512, 512)
    for width, height in ((3000, 2000), (1600, 900), (1000, 999), (4000, 500)):
        assert buckets.crop((width, height)).size == buckets.crop((height, width)).size[::-1]


def test_a_fixed_size_is_the_only_one():
    crop = Buckets((512, 512), fixed=True).crop((3000, 2000))

    assert (crop.size, crop.scaled, crop.offset) == ((512, 512), (768, 512), (128, 0))
    assert crop.lost == pytest.approx(1 / 3)


def test_a_crop_states_what_is_enlarged():
    assert cover((100, 50), (64, 64)).enlarged == 1.28
    assert cover((100, 50), (64, 64)).lost == 0.5


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"resolution": (32, 512)}, "resolution: 32x512: sides must be at least 64"),
        ({"resolution": (500, 512), "fixed": True}, "sides must be multiples of 64"),
        ({"resolution": (512, 512), "minimum": 900, "maximum": 1000}, "no size with sides from 900 to 1000"),
        ({"resolution": (512, 512), "step": 0}, "bucket_step: is 0"),
    ],
)
def test_impossible_buckets_are_refused(arguments, expected):
    with pytest.raises(RequestError, match=expected):
        Buckets(**arguments)

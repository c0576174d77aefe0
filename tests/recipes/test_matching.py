"""The judge of things: right on unseen renderings, and its gain as the formula defines it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from recipes.mini.dataset import JUDGE_SEED, sample
from recipes.mini.image_measures import background_rgb
from recipes.mini.matching import FINE, Matcher
from recipes.mini.names import COLOURS
from recipes.mini.rendering import Glyphs, render
from recipes.mini.scenes import UNIFORM, Background, PlacedThing, Scene
from tests.recipes.subset import THINGS as ALL_THINGS

THINGS = ALL_THINGS[::2]


@pytest.fixture(scope="module")
def matcher(glyphs: Glyphs) -> Matcher:
    return Matcher(THINGS, glyphs)


@pytest.mark.parametrize(("count", "scenes"), [(1, 8), (2, 3)])
def test_things_of_unseen_scenes_are_found_at_their_positions(
    matcher: Matcher, glyphs: Glyphs, count: int, scenes: int
):
    distribution = replace(
        UNIFORM, count_weights=(float(count == 1), float(count == 2), 0.0), gradients=0.0, tinted=0.0
    )
    right = 0
    for index in range(scenes):
        scene = sample(JUDGE_SEED, index, THINGS, distribution).scene
        found = {THINGS[match.thing].name: match for match in matcher.find(render(scene, glyphs), count)}
        right += found.keys() == {placed.thing.name for placed in scene.things}
        for placed in scene.things:
            if match := found.get(placed.thing.name):
                assert np.hypot(match.x - placed.x, match.y - placed.y) < 0.08

    assert right == scenes


def test_a_recoloured_thing_is_found_by_a_matcher_for_that_tint(glyphs: Glyphs):
    green = COLOURS[3]
    few = THINGS[::3]
    matcher = Matcher(few, glyphs, green)
    for thing in few[::4]:
        scene = Scene((PlacedThing(thing, 0.5, 0.5, 0.66, tint=green),), Background(COLOURS[9], COLOURS[9]))
        [match] = matcher.find(render(scene, glyphs))
        assert few[match.thing] == thing


def test_the_gain_is_the_reduction_of_the_squared_difference(matcher: Matcher, glyphs: Glyphs):
    white = Background(COLOURS[9], COLOURS[9])
    thing = THINGS[3]
    picture = render(Scene((PlacedThing(thing, 0.5, 0.5, 0.66),), white), glyphs)

    [match] = matcher.find(picture)

    background = background_rgb(picture) / 255
    pixels = np.asarray(picture.resize((FINE, FINE), 4), np.float64) / 255
    without_thing = ((pixels - background) ** 2).sum()
    assert THINGS[match.thing] == thing
    assert 0.9 * without_thing < match.gain <= without_thing * 1.001


def test_a_template_has_the_requested_size_and_position(matcher: Matcher, glyphs: Glyphs):
    bitmap = glyphs[THINGS[0].glyph]
    small = matcher._template(bitmap, 0.25, 0.75, 0.4, FINE)
    large = matcher._template(bitmap, 0.5, 0.5, 0.8, FINE)

    assert float(large[3].sum() / small[3].sum()) == pytest.approx(4, rel=0.05)
    rows, columns = torch.nonzero(small[3] > 0.05, as_tuple=True)
    assert float(rows.float().mean()) / FINE == pytest.approx(0.75, abs=0.06)
    assert float(columns.float().mean()) / FINE == pytest.approx(0.25, abs=0.06)

"""The judge of what a picture shows: right on unseen renderings, and its gain what the formula says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from recipes.mini.dataset import JUDGE_SEED, sample
from recipes.mini.looks import ground_of
from recipes.mini.matching import FINE, Matcher
from recipes.mini.names import COLOURS, load_things
from recipes.mini.rendering import Glyphs, render
from recipes.mini.scenes import FIRST_STAGE, Background, Placed, Scene

THINGS = load_things()[::12]


@pytest.fixture(scope="module")
def matcher(glyphs: Glyphs) -> Matcher:
    return Matcher(THINGS, glyphs)


@pytest.mark.parametrize("count", [1, 2])
def test_unseen_scenes_are_named_and_their_places_found(matcher: Matcher, glyphs: Glyphs, count: int):
    scenes = replace(FIRST_STAGE, counts=(float(count == 1), float(count == 2), 0.0), graded=0.0, tinted=0.0)
    right = 0
    for index in range(20):
        scene = sample(JUDGE_SEED, index, THINGS, scenes).scene
        seen = {THINGS[found.thing].name: found for found in matcher.find(render(scene, glyphs), count)}
        right += seen.keys() == {placed.thing.name for placed in scene.things}
        for placed in scene.things:
            if found := seen.get(placed.thing.name):
                assert np.hypot(found.x - placed.x, found.y - placed.y) < 0.08

    assert right >= 19


def test_a_thing_in_another_colour_is_known_where_that_colour_is_looked_for(glyphs: Glyphs):
    green = COLOURS[3]
    matcher = Matcher(THINGS, glyphs, green)
    for thing in THINGS[::9]:
        scene = Scene((Placed(thing, 0.5, 0.5, 0.66, tint=green),), Background(COLOURS[9], COLOURS[9]))
        [found] = matcher.find(render(scene, glyphs))
        assert THINGS[found.thing] == thing


def test_a_gain_is_the_squared_difference_that_is_explained(matcher: Matcher, glyphs: Glyphs):
    white = Background(COLOURS[9], COLOURS[9])
    thing = THINGS[3]
    picture = render(Scene((Placed(thing, 0.5, 0.5, 0.66),), white), glyphs)

    [found] = matcher.find(picture)

    ground = ground_of(picture) / 255
    pixels = np.asarray(picture.resize((FINE, FINE), 4), np.float64) / 255
    bare = ((pixels - ground) ** 2).sum()
    assert THINGS[found.thing] == thing
    assert 0.9 * bare < found.gain <= bare * 1.001


def test_what_is_laid_covers_as_much_as_it_is_large(matcher: Matcher, glyphs: Glyphs):
    bitmap = glyphs[THINGS[0].glyph]
    small = matcher._laid(bitmap, 0.25, 0.75, 0.4, FINE)
    large = matcher._laid(bitmap, 0.5, 0.5, 0.8, FINE)

    assert float(large[3].sum() / small[3].sum()) == pytest.approx(4, rel=0.05)
    rows, columns = torch.nonzero(small[3] > 0.05, as_tuple=True)
    assert float(rows.float().mean()) / FINE == pytest.approx(0.75, abs=0.06)
    assert float(columns.float().mean()) / FINE == pytest.approx(0.25, abs=0.06)

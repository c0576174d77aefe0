"""Scenes of the embedded model's data: names, sampling and distribution."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.mini.dataset import TRAINING_SEED, sample
from recipes.mini.scenes import COMMON, TRAINING, UNIFORM, Distribution, region_of, size_word, without_jitter
from tests.recipes.reading import COLOUR_OF_WORD, THINGS, words_of

numbers = st.integers(0, 10**9)


def test_no_glyph_and_no_name_belongs_to_two_things() -> None:
    glyph_counts = Counter(thing.glyph for thing in THINGS)
    name_counts = Counter(name for thing in THINGS for name in thing.words)

    assert max(glyph_counts.values()) == 1
    assert max(name_counts.values()) == 1
    assert not {word for name in name_counts for word in name.split()} & set(COLOUR_OF_WORD)


def test_every_glyph_is_one_emoji_whose_unicode_name_shares_a_word_with_ours() -> None:
    emoji = pytest.importorskip("emoji")
    # Names of ours that share no word with Unicode's, or are one word where Unicode's are two.
    ours = set(
        """car, burger, donut, snowman, house, gift, hat, clock, ladybug, soccer ball, key, honeydew, lettuce, pita,
        paella, tin can, spilled drink, chimp, seashell, campsite, river valley, temple, village, torii gate, jeep,
        highway,
        siren, road barrier, yacht, propeller plane, cable car, gondola, thunderstorm, sunshower, whirlpool,
        lightning bolt, water drop, frisbee, theatre masks, blouse, flip-flop, loudspeaker, bullhorn, compact disc,
        clapperboard, notebook, sheet of paper, price tag, set square, open padlock, pickaxe, chain, plaster, mousetrap,
        gravestone, starry-eyed face, explosion, puff of air""".replace("\n", " ").split(",")
    )
    ours = {" ".join(name.split()) for name in ours}

    for thing in THINGS:
        entry = emoji.EMOJI_DATA.get(thing.glyph) or emoji.EMOJI_DATA[thing.glyph + "\ufe0f"]
        official = {
            word for name in (entry["en"], *entry.get("alias", ())) for word in words_of(name.replace("_", " "))
        }
        words = {word for name in thing.words for word in words_of(name)}
        assert len(thing.glyph) == 1
        assert official & words or thing.name in ours, (thing, official)


def test_colours_of_things_are_named_colours() -> None:
    assert {thing.colour for thing in THINGS} - {""} <= set(COLOUR_OF_WORD.values())


@given(seed=numbers, index=numbers)
def test_a_sample_does_not_depend_on_samples_before_it(seed: int, index: int) -> None:
    before = sample(seed, index, THINGS)
    sample(seed, index + 1, THINGS)

    assert sample(seed, index, THINGS) == before


def test_seeds_do_not_share_samples() -> None:
    scenes = [{repr(sample(seed, index, THINGS).scene) for index in range(500)} for seed in range(1, 5)]

    assert len(set.union(*scenes)) == 2000


def test_scenes_follow_the_distribution() -> None:
    count = 20_000
    scenes = [sample(5, index, THINGS).scene for index in range(count)]
    d = Distribution()
    things = [placed for scene in scenes for placed in scene.things]

    def close(share: float, expected: float, of: int) -> bool:
        return abs(share - expected) < 4 * (expected * (1 - expected) / of) ** 0.5

    singles = [scene for scene in scenes if len(scene.things) == 1]
    for number, expected in enumerate(d.count_weights, 1):
        assert close(sum(len(scene.things) == number for scene in scenes) / count, expected, count)
    assert close(sum(scene.background.direction != "" for scene in scenes) / count, d.gradients, count)
    assert close(sum(size_word(scene) == "small" for scene in singles) / len(singles), d.small, len(singles))
    assert close(sum(size_word(scene) == "large" for scene in singles) / len(singles), d.large, len(singles))
    assert close(sum(placed.angle != 0 for placed in things) / len(things), d.rotated, len(things))
    assert not any(placed.flip for placed in things)
    assert close(sum(placed.tint is not None for placed in things) / len(things), d.tinted, len(things))
    by_thing = Counter(placed.thing.name for placed in things)
    assert len(by_thing) == len(THINGS)
    # Poisson counts of about 30: none of 871 deviates further.
    mean = len(things) / len(THINGS)
    assert all(abs(count - mean) < 5.5 * mean**0.5 for count in by_thing.values())


def test_things_of_a_scene_differ_and_their_centres_are_apart() -> None:
    several = Distribution(count_weights=(0, 0.5, 0.5))
    for index in range(500):
        placed = sample(3, index, THINGS, several).scene.things
        assert len({one.thing for one in placed}) == len(placed)
        for i, one in enumerate(placed):
            for other in placed[:i]:
                assert np.hypot(one.x - other.x, one.y - other.y) > 0.9 * max(one.size, other.size) - 0.05


def test_training_samples_common_things_more_often_and_no_thing_twice_in_a_scene() -> None:
    scenes = [sample(TRAINING_SEED, index, THINGS, TRAINING).scene for index in range(4000)]
    common = {thing.name for thing in THINGS[:COMMON]}
    single = [scene.things[0].thing.name in common for scene in scenes if len(scene.things) == 1]
    share = TRAINING.common_weight * COMMON / (TRAINING.common_weight * COMMON + len(THINGS) - COMMON)
    assert abs(np.mean(single) - share) < 4 * (share * (1 - share) / len(single)) ** 0.5
    assert all(len({placed.thing.name for placed in scene.things}) == len(scene.things) for scene in scenes)


@given(index=numbers)
@settings(max_examples=200)
def test_a_scene_without_jitter_keeps_all_that_captions_state(index: int) -> None:
    scene = sample(TRAINING_SEED, index, THINGS).scene
    nominal = without_jitter(scene)
    assert without_jitter(nominal) == nominal
    assert nominal.background == scene.background and size_word(nominal) == size_word(scene)
    for placed, before in zip(nominal.things, scene.things, strict=True):
        assert (placed.thing, placed.tint, region_of(placed)) == (before.thing, before.tint, region_of(before))
        assert placed.angle == 0 and {placed.x, placed.y} <= {0.25, 0.5, 0.75}
        assert abs(placed.x - before.x) <= UNIFORM.jitter and abs(placed.y - before.y) <= UNIFORM.jitter

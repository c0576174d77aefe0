"""The embedded model's data: what scenes, pictures, captions and prompts promise each other."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from gouache.errors import FileError, RequestError
from recipes.mini.captions import SIZE_WORDS
from recipes.mini.dataset import TRAINING_SEED, dataset, sample
from recipes.mini.evaluate import background_of
from recipes.mini.names import COLOURS, load_things, nearest_colour
from recipes.mini.prompts import MORE_PROMPTS_FILE, PROMPTS_FILE, noun_pairs, read_prompts
from recipes.mini.rendering import STRIKE, Glyphs, find_font, render
from recipes.mini.scenes import (
    COMMON,
    FIRST_STAGE,
    TAUGHT,
    Background,
    Distribution,
    Placed,
    Scene,
    place_of,
    settled,
    size_word,
)

THINGS = load_things()
COLOUR_OF_WORD = {word: colour.name for colour in COLOURS for word in colour.words}
numbers = st.integers(0, 10**9)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


NAME_OF_WORD = {word: thing.name for thing in THINGS for word in thing.words}
ANY_THING = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in sorted(NAME_OF_WORD, key=len, reverse=True)))


def split_things(text: str) -> tuple[Counter[str], str]:
    """Which things a text names, by longest match (a "palm tree" is not also a tree), and the text without them."""
    return Counter(NAME_OF_WORD[word] for word in ANY_THING.findall(text)), ANY_THING.sub("#", text)


def test_no_glyph_and_no_word_stands_for_two_things() -> None:
    glyph_counts = Counter(thing.glyph for thing in THINGS)
    word_counts = Counter(word for thing in THINGS for word in thing.words)

    assert max(glyph_counts.values()) == 1
    assert max(word_counts.values()) == 1
    assert not {word for words in word_counts for word in words.split()} & set(COLOUR_OF_WORD)


def test_every_glyph_is_one_emoji_that_the_unicode_list_knows_by_a_word_of_ours() -> None:
    emoji = pytest.importorskip("emoji")
    # Names of ours that share no word with Unicode's own, or are one word where Unicode's are two.
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
        said = {word for words in thing.words for word in words_of(words)}
        assert len(thing.glyph) == 1
        assert official & said or thing.name in ours, (thing, official)


def test_colours_of_things_are_colours_we_name() -> None:
    assert {thing.colour for thing in THINGS} - {""} <= set(COLOUR_OF_WORD.values())


@given(seed=numbers, index=numbers)
def test_a_sample_is_the_same_every_time_it_is_asked_for(seed: int, index: int) -> None:
    before = sample(seed, index, THINGS)
    sample(seed, index + 1, THINGS)

    assert sample(seed, index, THINGS) == before


def test_pictures_do_not_depend_on_where_reading_starts(glyphs: Glyphs) -> None:
    whole = list(dataset(7, 0, 24, THINGS, glyphs, size=64))
    pieces = [
        pair for start in (0, 5, 17) for pair in dataset(7, start, {0: 5, 5: 12, 17: 7}[start], THINGS, glyphs, 64)
    ]

    assert [text for _, text in whole] == [text for _, text in pieces]
    assert all(a.tobytes() == b.tobytes() for (a, _), (b, _) in zip(whole, pieces))


def test_seeds_do_not_share_samples() -> None:
    drawn = [{repr(sample(seed, index, THINGS).scene) for index in range(500)} for seed in range(1, 5)]

    assert len(set.union(*drawn)) == 2000


@settings(max_examples=300, deadline=None)
@given(seed=numbers, index=numbers)
def test_a_caption_names_every_thing_of_its_scene_once_and_no_other(seed: int, index: int) -> None:
    drawn = sample(seed, index, THINGS)

    assert split_things(drawn.caption)[0] == Counter(placed.thing.name for placed in drawn.scene.things)


@settings(max_examples=300, deadline=None)
@given(seed=numbers, index=numbers)
def test_a_caption_says_no_colour_size_or_side_that_the_scene_has_not(seed: int, index: int) -> None:
    drawn = sample(seed, index, THINGS)
    scene, said = drawn.scene, set(words_of(split_things(drawn.caption)[1]))

    own = {placed.tint.name if placed.tint else placed.thing.colour for placed in scene.things}
    ground = {scene.background.start.name, scene.background.end.name}
    assert {COLOUR_OF_WORD[word] for word in said & set(COLOUR_OF_WORD)} <= own | ground
    for size, ways in SIZE_WORDS.items():
        if said & set(ways):
            assert size_word(scene) == size
    if len(scene.things) == 1:
        place = set(place_of(scene.things[0]).replace("centre", "").split())
        assert said & {"left", "right", "top", "bottom"} <= place
    if {"gradient", "graded", "fading"} & said:
        assert scene.background.direction
    if "plain" in said:
        assert not scene.background.direction


@settings(max_examples=300, deadline=None)
@given(index=numbers)
def test_left_and_right_above_and_below_are_said_as_they_are(index: int) -> None:
    two = Distribution(counts=(0, 1, 0))
    drawn = sample(11, index, THINGS, two)
    first, second = drawn.scene.things
    text = drawn.caption
    for placed, letter in ((first, "A"), (second, "B")):
        for word in sorted(placed.thing.words, key=len, reverse=True):
            text = re.sub(rf"\b{word}\b", letter, text)

    if re.search(r"A (to the )?left of|A on the left|B (to the )?right of|B on the right", text):
        assert first.x < second.x - 0.3
    if re.search(r"A above|A at the top|B below|B under", text):
        assert first.y < second.y - 0.3
    assert not re.search(r"B [a-z ]*left of|B on the left|A on the right|B above|B at the top|A below|A under", text)


def test_where_no_side_is_said_things_stand_as_they_are_read() -> None:
    met = Counter()
    for index in range(3000):
        drawn = sample(12, index, THINGS, Distribution(counts=(0, 0.8, 0.2)))
        text = drawn.caption
        for letter, placed in zip("ABC", drawn.scene.things):
            for word in sorted(placed.thing.words, key=len, reverse=True):
                text = re.sub(rf"\b{word}\b", letter, text)
        two = re.search(r"([AB]) (?:and|next to|beside|together with) .*?\b([AB])\b", text)
        if len(drawn.scene.things) == 2 and two and not re.search(r"left|right|top|bottom", text):
            assert two.groups() == ("A", "B")
            assert drawn.scene.things[0].x < drawn.scene.things[1].x - 0.3
            met["two"] += 1
        three = re.search(r"\bA, .*\bB and .*\bC\b", text)
        met["three"] += bool(three)
        assert not re.search(r"\b[BC], .*\b[A-C] and|A, .*C and", text)
    assert met["two"] > 500 and met["three"] > 100


def test_captions_are_varied() -> None:
    texts = [sample(TRAINING_SEED, index, THINGS, TAUGHT).caption for index in range(5000)]

    assert len(set(texts)) > 4000


def test_scenes_follow_the_distribution() -> None:
    count = 20_000
    scenes = [sample(5, index, THINGS).scene for index in range(count)]
    d = Distribution()
    things = [placed for scene in scenes for placed in scene.things]

    def close(share: float, expected: float, of: int) -> bool:
        return abs(share - expected) < 4 * (expected * (1 - expected) / of) ** 0.5

    singles = [scene for scene in scenes if len(scene.things) == 1]
    for number, expected in enumerate(d.counts, 1):
        assert close(sum(len(scene.things) == number for scene in scenes) / count, expected, count)
    assert close(sum(scene.background.direction != "" for scene in scenes) / count, d.graded, count)
    assert close(sum(size_word(scene) == "small" for scene in singles) / len(singles), d.small, len(singles))
    assert close(sum(size_word(scene) == "large" for scene in singles) / len(singles), d.large, len(singles))
    assert close(sum(placed.angle != 0 for placed in things) / len(things), d.turned, len(things))
    assert not any(placed.flip for placed in things)
    assert close(sum(placed.tint is not None for placed in things) / len(things), d.tinted, len(things))
    each = Counter(placed.thing.name for placed in things)
    assert len(each) == len(THINGS)
    # Of Poisson counts around 30, none of 871 strays further.
    usual = len(things) / len(THINGS)
    assert all(abs(count - usual) < 5.5 * usual**0.5 for count in each.values())


def test_things_of_a_scene_differ_and_their_centres_lie_apart() -> None:
    several = Distribution(counts=(0, 0.5, 0.5))
    for index in range(500):
        placed = sample(3, index, THINGS, several).scene.things
        assert len({one.thing for one in placed}) == len(placed)
        for i, one in enumerate(placed):
            for other in placed[:i]:
                assert np.hypot(one.x - other.x, one.y - other.y) > 0.9 * max(one.size, other.size) - 0.05


def test_common_things_are_taught_oftener_and_no_scene_holds_a_thing_twice() -> None:
    scenes = [sample(TRAINING_SEED, index, THINGS, TAUGHT).scene for index in range(4000)]
    common = {thing.name for thing in THINGS[:COMMON]}
    single = [scene.things[0].thing.name in common for scene in scenes if len(scene.things) == 1]
    share = TAUGHT.often * COMMON / (TAUGHT.often * COMMON + len(THINGS) - COMMON)
    assert abs(np.mean(single) - share) < 4 * (share * (1 - share) / len(single)) ** 0.5
    assert all(len({placed.thing.name for placed in scene.things}) == len(scene.things) for scene in scenes)


@given(index=numbers)
@settings(max_examples=200)
def test_a_settled_scene_keeps_all_that_words_can_tell_and_no_chance(index: int) -> None:
    scene = sample(TRAINING_SEED, index, THINGS).scene
    calm = settled(scene)
    assert settled(calm) == calm
    assert calm.background == scene.background and size_word(calm) == size_word(scene)
    for placed, before in zip(calm.things, scene.things, strict=True):
        assert (placed.thing, placed.tint, place_of(placed)) == (before.thing, before.tint, place_of(before))
        assert placed.angle == 0 and {placed.x, placed.y} <= {0.25, 0.5, 0.75}
        assert abs(placed.x - before.x) <= FIRST_STAGE.shift and abs(placed.y - before.y) <= FIRST_STAGE.shift


def test_a_plain_background_is_exactly_the_named_colour_and_a_shaded_one_nearest_to_it(glyphs: Glyphs) -> None:
    seen = Counter()
    for index in range(300):
        scene = sample(9, index, THINGS).scene
        background = scene.background
        picture = np.asarray(render(Scene((), background), glyphs, 32))
        if not background.direction:
            assert (picture == background.start.rgb).all()
        elif background.start == background.end:
            corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]].tolist()
            assert {nearest_colour(corner) for corner in corners} == {background.start}
        else:
            assert tuple(picture[0, 0]) == background.start.rgb
            assert tuple(picture[-1, -1]) == background.end.rgb
        if background.start == background.end:
            assert background_of(render(scene, glyphs, 64)) == background.start
        seen[bool(background.direction), background.start == background.end] += 1
    assert len(seen) == 3


def test_a_thing_laid_at_its_own_size_looks_as_pillow_draws_it_on_that_colour(glyphs: Glyphs) -> None:
    font = ImageFont.truetype(str(glyphs.path), STRIKE)
    for thing in THINGS[::7]:
        side = max(glyphs[thing.glyph].size)
        colour = COLOURS[0]
        direct = Image.new("RGB", (256, 256), colour.rgb)
        ImageDraw.Draw(direct).text((60, 60), thing.glyph, font=font, embedded_color=True)

        scene = Scene((Placed(thing, 0.5, 0.5, side / 256),), Background(colour, colour))
        ours = np.asarray(render(scene, glyphs, 256), np.int16)

        drawn = np.asarray(direct, np.int16)
        rows, columns = np.nonzero((drawn != colour.rgb).any(2))
        inked_rows, inked_columns = np.nonzero((ours != colour.rgb).any(2))
        theirs = drawn[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        mine = ours[inked_rows.min() : inked_rows.max() + 1, inked_columns.min() : inked_columns.max() + 1]
        assert mine.shape == theirs.shape
        assert np.abs(mine - theirs).max() <= 2


def test_size_is_the_longer_side_as_a_share_of_the_frame_and_place_the_centre(glyphs: Glyphs) -> None:
    white = COLOURS[9]
    for thing in THINGS[::9]:
        for size, x, y in ((0.3, 0.25, 0.7), (0.6, 0.5, 0.5)):
            picture = render(Scene((Placed(thing, x, y, size),), Background(white, white)), glyphs)
            rows, columns = np.nonzero((np.asarray(picture) != white.rgb).any(2))
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert max(height, width) == pytest.approx(size * 128, abs=2.5)
            assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(x * 128, abs=2)
            assert (rows.min() + rows.max() + 1) / 2 == pytest.approx(y * 128, abs=2)


def test_a_font_that_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^font: there is no file .*missing\.ttf$"):
        find_font(tmp_path / "missing.ttf")


def test_there_are_sixty_prompts_ten_for_two_things_and_five_noun_pairs() -> None:
    prompts = read_prompts()

    assert len(prompts) == 60
    assert sum(len(prompt.things) == 2 for prompt in prompts) == 10
    assert len(noun_pairs(prompts)) == 5
    assert {prompt.colour for prompt in prompts} == {colour.name for colour in COLOURS}


def test_a_prompt_says_the_things_and_the_colour_that_it_expects() -> None:
    for prompt in (*read_prompts(), *read_prompts(MORE_PROMPTS_FILE)):
        if prompt.tint:
            assert prompt.tint in words_of(prompt.text), prompt
        assert split_things(prompt.text.lower())[0] == Counter(prompt.things), prompt
        assert prompt.colour in words_of(prompt.text), prompt


def test_hardly_a_prompt_is_a_caption_of_the_first_twenty_thousand_training_samples() -> None:
    texts = {sample(TRAINING_SEED, index, THINGS, TAUGHT).caption for index in range(20_000)}

    for path in (PROMPTS_FILE, MORE_PROMPTS_FILE):
        prompts = {prompt.text for prompt in read_prompts(path)}
        assert len(texts & prompts) <= len(prompts) // 50


def test_two_hundred_more_prompts_ask_for_paint_and_sides() -> None:
    prompts = read_prompts(MORE_PROMPTS_FILE)

    assert len({prompt.text for prompt in prompts}) == 200
    assert sum(prompt.tint != "" for prompt in prompts) == 40
    assert sum(len(prompt.things) == 2 for prompt in prompts) == 40
    assert Counter(prompt.side for prompt in prompts if len(prompt.things) == 2) == {"beside": 20, "over": 12, "": 8}
    assert all(len(prompt.things) == 2 for prompt in prompts if prompt.side)


def test_paraphrases_hold_words_that_no_training_caption_has() -> None:
    taught = {word for index in range(5000) for word in words_of(sample(TRAINING_SEED, index, THINGS, TAUGHT).caption)}

    for prompt in read_prompts()[-20:]:
        assert set(words_of(prompt.text)) - taught, prompt


def test_a_prompt_for_a_thing_that_is_not_taught_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# comment\na zeppelin on red\tzeppelin\tred\n", encoding="utf-8")

    with pytest.raises(RequestError, match="line 2: 'zeppelin'"):
        read_prompts(path)


def test_a_file_of_prompts_that_cannot_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"^.*none\.txt: cannot be read"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "picture.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="is not UTF-8"):
        read_prompts(tmp_path / "picture.txt")

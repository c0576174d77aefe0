"""The embedded model's evaluation: verdicts, figures and contact sheet, for pictures whose content is known."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from gouache.errors import RequestError
from recipes.mini.contact_sheet import RIGHT, THUMB, Cell, contact_sheet
from recipes.mini.dataset import TRAINING_SEED, sample
from recipes.mini.evaluate import SEEDS, Verdict, background_of, figures, judge, picture_path, variety
from recipes.mini.names import COLOURS
from recipes.mini.prompts import Prompt
from recipes.mini.rendering import Glyphs, render
from recipes.mini.scenes import TRAINING, Background, PlacedThing, Scene
from tests.recipes.subset import THINGS

PROMPTS = (
    Prompt("a cat on red", ("cat",), "red"),
    Prompt("a dog on red", ("dog",), "red"),
    Prompt("a cat and a dog, blue", ("cat", "dog"), "blue"),
)


def verdict(prompt: int, seed: int, things: tuple[str, ...], colour: str) -> Verdict:
    requested = PROMPTS[prompt]
    return Verdict(prompt, seed, things, colour, set(things) == set(requested.things), colour == requested.colour)


def test_figures_equal_percentages_counted_by_hand() -> None:
    verdicts = [
        *(verdict(0, seed, ("cat",), "red") for seed in SEEDS),
        *(verdict(1, seed, ("dog",) if seed == 1 else ("cat",), "blue") for seed in SEEDS),
        *(verdict(2, seed, ("cat", "dog") if seed < 3 else ("cat", "pig"), "blue") for seed in SEEDS),
    ]

    shares = figures(PROMPTS, verdicts)

    assert shares["subject right"] == pytest.approx(100 * 7 / 12, abs=0.05)
    assert shares["subject right, prompts for one thing"] == pytest.approx(100 * 5 / 8, abs=0.05)
    assert shares["subject right, prompts for two things"] == 50
    assert shares["background right"] == pytest.approx(100 * 8 / 12, abs=0.05)
    assert shares["noun pairs: subjects differ"] == 25
    assert shares["noun pairs: both right"] == 25


def test_a_verdict_compares_the_picture_with_the_prompt(tmp_path: Path, glyphs: Glyphs) -> None:
    few = [thing for thing in THINGS if thing.name in ("cat", "dog", "pig", "apple")]
    named, colours = {thing.name: thing for thing in few}, {colour.name: colour for colour in COLOURS}
    prompts = (*PROMPTS, Prompt("a green apple", ("apple",), "white", "green"))
    prompts += (Prompt("a pig over a dog", ("pig", "dog"), "blue", side="over"),)

    def scene(background: str, *placed: PlacedThing) -> Scene:
        return Scene(placed, Background(colours[background], colours[background]))

    left, right, middle = (0.25, 0.5, 0.46), (0.75, 0.5, 0.46), (0.5, 0.5, 0.66)
    scenes = [
        scene("red", PlacedThing(named["cat"], *middle)),
        scene("red", PlacedThing(named["cat"], *middle)),
        scene("blue", PlacedThing(named["dog"], *left), PlacedThing(named["cat"], *right)),
        scene("white", PlacedThing(named["apple"], *middle, tint=colours["green"])),
        scene("blue", PlacedThing(named["dog"], *left), PlacedThing(named["pig"], *right)),
    ]
    for number, each in enumerate(scenes):
        for seed in SEEDS:
            render(each, glyphs).save(picture_path(tmp_path, number, seed))

    verdicts = judge(prompts, tmp_path, few, glyphs)[:: len(SEEDS)]

    assert [v.things for v in verdicts] == [("cat",), ("cat",), ("cat", "dog"), ("apple",), ("dog", "pig")]
    assert [v.things_right for v in verdicts] == [True, False, True, True, True]
    assert all(v.colour_right for v in verdicts)
    assert [v.tint for v in verdicts] == ["", "", "", "green", ""]
    assert [v.sides_right for v in verdicts] == [None, None, None, None, False]
    assert all(type(value) in (str, int, bool, tuple, type(None)) for v in verdicts for value in asdict(v).values())


def test_a_missing_picture_is_an_error(tmp_path: Path, glyphs: Glyphs) -> None:
    with pytest.raises(RequestError, match=r"001-1\.png is missing"):
        judge(PROMPTS, tmp_path, THINGS[:2], glyphs)


def test_the_background_is_measured_at_the_border_only() -> None:
    for colour in COLOURS:
        for other in COLOURS:
            picture = Image.new("RGB", (128, 128), colour.rgb)
            picture.paste(other.rgb, (16, 8, 112, 120))
            assert background_of(picture) == colour


def test_the_sheet_has_every_picture_and_solid_bars_for_right_ones() -> None:
    fills = [(20 * n, 90, 255 - 20 * n) for n in range(8)]
    cells = [
        Cell("a cat", tuple(Image.new("RGB", (128, 128), rgb) for rgb in fills[:4]), ((True, False),) * 4),
        Cell("a dog", tuple(Image.new("RGB", (128, 128), rgb) for rgb in fills[4:]), ((False, False),) * 4),
    ]

    sheet = contact_sheet("mini", cells)

    counts = {rgb: count for count, rgb in sheet.getcolors(1 << 20) or []}
    assert all(counts[rgb] == THUMB * THUMB for rgb in fills)
    bars = counts[RIGHT]
    assert bars % 4 == 0
    assert 4 * THUMB < bars < 4 * THUMB * THUMB // 4


def test_variety_counts_equal_pictures_and_copies_of_training_pictures(
    tmp_path: Path, glyphs: Glyphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.mini.evaluate.RENDERINGS", 8)
    trained = render(sample(TRAINING_SEED, 3, THINGS, TRAINING).scene, glyphs)
    for seed in SEEDS:
        plain = Image.new("RGB", (128, 128), (60 * seed, 10, 255 - 60 * seed))
        plain.save(picture_path(tmp_path, 0, seed))
        (trained if seed > 2 else plain).save(picture_path(tmp_path, 1, seed))

    shares = variety(PROMPTS[:2], tmp_path, THINGS, glyphs)

    assert shares == {"prompts whose seeds differ": 50, "copies of a training rendering": 25}

"""The embedded model's evaluation: verdicts, figures and sheet, on pictures whose content is known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[2]))  # recipes/ stands beside the package, not in it

from gouache.errors import RequestError
from recipes.mini.classifier import Classifier, as_input, load_or_train, train
from recipes.mini.contact_sheet import RIGHT, THUMB, Cell, contact_sheet
from recipes.mini.evaluate import SEEDS, Verdict, background_of, figures, judge, picture_path
from recipes.mini.names import COLOURS, load_things
from recipes.mini.prompts import Prompt
from recipes.mini.rendering import Glyphs

THINGS = load_things()
PROMPTS = (
    Prompt("a cat on red", ("cat",), "red"),
    Prompt("a dog on red", ("dog",), "red"),
    Prompt("a cat and a dog, blue", ("cat", "dog"), "blue"),
)


@pytest.fixture(scope="module")
def glyphs() -> Glyphs:
    try:
        return Glyphs()
    except RequestError as error:
        pytest.skip(str(error))


def verdict(prompt: int, seed: int, things: tuple[str, ...], colour: str) -> Verdict:
    asked = PROMPTS[prompt]
    return Verdict(prompt, seed, things, colour, set(things) == set(asked.things), colour == asked.colour)


def test_figures_are_the_shares_that_a_count_by_hand_gives() -> None:
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


class SeesRedAsCat(Classifier):
    """Answers by the red channel alone: what `judge` does with answers can be told from the pictures."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        names = [thing.name for thing in THINGS]
        logits = torch.zeros(len(pictures), len(names))
        red = pictures[:, 0].mean((1, 2)) > 0
        logits[:, names.index("cat")] = red * 2.0
        logits[:, names.index("dog")] = 1.0
        return logits


def test_a_verdict_compares_what_is_seen_with_what_was_asked(tmp_path: Path) -> None:
    for number, colour in enumerate(((215, 35, 40), (215, 35, 40), (40, 90, 215))):
        for seed in SEEDS:
            Image.new("RGB", (128, 128), colour).save(picture_path(tmp_path, number, seed))

    verdicts = judge(PROMPTS, tmp_path, SeesRedAsCat(len(THINGS)), THINGS)

    assert [v.things for v in verdicts[:: len(SEEDS)]][:2] == [("cat",), ("cat",)]
    assert [v.things_right for v in verdicts[:: len(SEEDS)]][:2] == [True, False]
    assert all(v.colour_right for v in verdicts)


def test_a_missing_picture_is_an_error_and_not_left_out(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"001-1\.png is missing"):
        judge(PROMPTS, tmp_path, SeesRedAsCat(len(THINGS)), THINGS)


def test_the_background_is_read_from_the_border_and_not_from_the_middle() -> None:
    for colour in COLOURS:
        for other in COLOURS:
            picture = Image.new("RGB", (128, 128), colour.rgb)
            picture.paste(other.rgb, (16, 8, 112, 120))
            assert background_of(picture) == colour


def test_the_sheet_shows_every_picture_and_fills_the_bars_of_right_ones() -> None:
    shades = [(20 * n, 90, 255 - 20 * n) for n in range(8)]
    cells = [
        Cell("a cat", tuple(Image.new("RGB", (128, 128), rgb) for rgb in shades[:4]), ((True, False),) * 4),
        Cell("a dog", tuple(Image.new("RGB", (128, 128), rgb) for rgb in shades[4:]), ((False, False),) * 4),
    ]

    sheet = contact_sheet("mini", cells)

    counts = {rgb: count for count, rgb in sheet.getcolors(1 << 20) or []}
    assert all(counts[rgb] == THUMB * THUMB for rgb in shades)
    bars = counts[RIGHT]
    assert bars % 4 == 0
    assert 4 * THUMB < bars < 4 * THUMB * THUMB // 4


def test_pictures_of_any_size_come_to_the_classifier_as_the_range_it_learned() -> None:
    pictures = [Image.new("RGB", (128, 128), "white"), Image.new("RGB", (64, 64), "black")]

    inputs = as_input(pictures)

    assert inputs.shape == (2, 3, 64, 64)
    assert inputs[0].min() == 1
    assert inputs[1].max() == -1


def test_a_kept_classifier_is_read_back_and_answers_alike(
    tmp_path: Path, glyphs: Glyphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, path = THINGS[:4], tmp_path / "classifier.safetensors"
    monkeypatch.setattr("recipes.mini.classifier.train", lambda things, glyphs: train(things, glyphs, steps=2))
    first = load_or_train(path, few, glyphs)
    monkeypatch.delattr("recipes.mini.classifier.train")  # a second training would fail
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    second = load_or_train(path, few, glyphs)

    assert torch.equal(first(pictures), second(pictures))

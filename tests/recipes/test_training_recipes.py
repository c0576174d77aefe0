"""The recipes of training: a short run of each writes its files and numbers, and the numbers measure what they say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import recipes.dreambooth.__main__ as dreambooth
import recipes.embedding.__main__ as embedding
import recipes.hypernetwork.__main__ as hypernetwork
import recipes.lora.__main__ as lora
import recipes.techniques.__main__ as techniques
from recipes.lora.screen_print import INKS, PAPER, screen_print


def drawing(colour: str, box: tuple[int, int, int, int]) -> Image.Image:
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).rectangle(box, fill=colour)
    return picture


BEFORE = [drawing("red", (10, 10, 40, 40)), drawing("blue", (20, 30, 60, 50))]


def test_a_print_has_paper_outside_things_and_ink_by_tone_inside():
    for colour, printed in (("black", INKS[1]), ("orange", INKS[0]), ("yellow", PAPER)):
        picture = np.asarray(screen_print(drawing(colour, (16, 16, 48, 48))))
        assert tuple(picture[32, 32]) == printed and tuple(picture[4, 4]) == PAPER


def test_learnt_is_0_without_a_change_and_1_for_prints():
    assert lora.learnt(BEFORE, BEFORE) == 0
    assert lora.learnt(BEFORE, [screen_print(picture) for picture in BEFORE]) == 1
    assert lora.learnt(BEFORE, [drawing("lime", (0, 0, 63, 63))] * 2) <= 0


def test_kept_is_1_for_equal_outlines_whatever_the_colours_and_low_for_others():
    recoloured = [drawing("green", (10, 10, 40, 40)), drawing("black", (20, 30, 60, 50))]

    assert lora.kept(BEFORE, recoloured) > 0.95
    assert lora.kept(BEFORE, [screen_print(picture) for picture in BEFORE]) > 0.6
    assert lora.kept(BEFORE, BEFORE[::-1]) < 0.5


def test_violet_is_the_share_of_the_character():
    half = drawing("white", (0, 0, 1, 1))
    ImageDraw.Draw(half).rectangle((0, 0, 63, 31), fill=dreambooth.VIOLET)

    assert dreambooth.violet([half]) == pytest.approx(0.5)
    assert dreambooth.violet([drawing("red", (0, 0, 63, 63))]) == 0


def quick_picture(model: object, prompt: str, seed: int) -> Image.Image:
    """Faster than the model."""
    return BEFORE[seed % 2]


@pytest.mark.full
def test_the_same_drawings_are_learnt_in_four_ways(tmp_path, capsys, monkeypatch):
    torch.set_num_threads(1)
    train = techniques.gouache.train
    monkeypatch.setattr(
        techniques.gouache, "train", lambda *a, samples, **b: train(*a, samples={**samples, "steps": 1}, **b)
    )
    monkeypatch.setattr(techniques, "painted", quick_picture)

    assert techniques.main([str(tmp_path), "--steps", "2"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["lora", "dreambooth", "embedding", "hypernetwork"]
    assert (tmp_path / "techniques.png").is_file()


@pytest.mark.parametrize(
    ("recipe", "arguments", "file"),
    [
        pytest.param(embedding, ["--steps", "2"], "zorblax.safetensors", marks=pytest.mark.full),
        pytest.param(lora, ["--steps", "2", "--pictures", "2"], "print.safetensors", marks=pytest.mark.full),
        pytest.param(hypernetwork, ["--steps", "2", "--pictures", "2"], "print.pt", marks=pytest.mark.full),
        pytest.param(
            dreambooth, ["--steps", "2", "--class-pictures", "2"], "zorblax.safetensors", marks=pytest.mark.full
        ),
    ],
)
def test_a_short_run_writes_the_file_the_sheet_and_two_numbers(
    recipe,
    arguments: list[str],
    file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    torch.set_num_threads(1)
    train = recipe.gouache.train
    quick = {"steps": 1}
    monkeypatch.setattr(recipe.gouache, "train", lambda *a, samples, **b: train(*a, samples={**samples, **quick}, **b))
    for module in (recipe, lora):
        monkeypatch.setattr(module, "painted", quick_picture, raising=False)

    assert recipe.main([str(tmp_path), *arguments]) == 0

    assert re.fullmatch(r"learnt -?\d\.\d\d  kept -?\d\.\d\d\n", capsys.readouterr().out)
    assert (tmp_path / file).is_file() and (tmp_path / "before-after.png").is_file()

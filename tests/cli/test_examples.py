"""`gouache paint --examples`: sixteen pictures with their recipes, and a sheet of all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gouache.cli.examples import PROMPTS
from gouache.generate.picture import read_recipe
from gouache.images.sheet import tiled
from tests.cli.conftest import Command


def test_each_example_has_a_recipe_and_the_sheet_shows_them_row_by_row(gouache: Command, tmp_path: Path):
    ended = gouache("paint", "--examples", "-o", "shown", "--steps", 1, "--steps-sheet")

    names = [f"{number:02d}{end}.png" for number in range(1, 17) for end in ("", "-steps")] + ["sheet.png"]
    assert (ended.code, ended.out.split(), ended.err) == (0, [f"shown/{name}" for name in names], "")
    folder = tmp_path / "shown"
    assert all((folder / name).is_file() for name in names)
    prompts = [read_recipe(folder / f"{number:02d}.png")[0]["request"]["prompt"] for number in range(1, 17)]
    assert tuple(prompts) == PROMPTS
    sheet = np.asarray(Image.open(folder / "sheet.png").convert("RGB"))
    sixth = np.asarray(Image.open(folder / "06.png").convert("RGB"))
    assert sheet.shape == (4 * 128 + 3 * 4, 4 * 128 + 3 * 4, 3)
    assert (sheet[132:260, 132:260] == sixth).all()


def test_the_last_row_of_tiles_may_be_shorter():
    images = [Image.new("RGB", (10, 8), (n, 0, 0)) for n in range(5)]

    sheet = tiled(images, across=4)

    assert sheet.size == (4 * 10 + 3 * 4, 2 * 8 + 4)
    assert sheet.getpixel((5, 15)) == (4, 0, 0)
    assert sheet.getpixel((25, 15)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("paint",), "prompt: is missing"),
        (("paint", "a cat", "--examples"), "prompt: cannot be given with --examples"),
        (("paint", "--examples", "-o", "a.png"), "a.png is the name of a file; --examples writes a folder"),
    ],
)
def test_options_that_exclude_each_other_are_refused_in_one_line(
    gouache: Command, arguments: tuple[str, ...], line: str
):
    ended = gouache(*arguments)

    assert ended.code == 2
    assert line in ended.err
    assert len(ended.err.strip().splitlines()) == 1

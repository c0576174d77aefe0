"""Rendering of scenes: colours, sizes and positions of what is drawn, and the fonts it is drawn with."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from gouache.errors import RequestError
from recipes.mini.dataset import dataset, sample
from recipes.mini.evaluate import background_of
from recipes.mini.names import COLOURS, nearest_colour
from recipes.mini.rendering import STRIKE, Glyphs, find_font, render
from recipes.mini.scenes import Background, PlacedThing, Scene
from tests.recipes.subset import FONT, FONTS, GLYPHS, THINGS


def test_pictures_do_not_depend_on_where_reading_starts(glyphs: Glyphs) -> None:
    whole = list(dataset(7, 0, 24, THINGS, glyphs, size=64))
    pieces = [
        pair for start in (0, 5, 17) for pair in dataset(7, start, {0: 5, 5: 12, 17: 7}[start], THINGS, glyphs, 64)
    ]

    assert [text for _, text in whole] == [text for _, text in pieces]
    assert all(a.tobytes() == b.tobytes() for (a, _), (b, _) in zip(whole, pieces))


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


def test_a_thing_at_its_original_size_is_drawn_as_pillow_draws_the_glyph(glyphs: Glyphs) -> None:
    font = ImageFont.truetype(str(glyphs.path), STRIKE)
    for thing in THINGS[::4]:
        side = max(glyphs[thing.glyph].size)
        colour = COLOURS[0]
        direct = Image.new("RGB", (256, 256), colour.rgb)
        ImageDraw.Draw(direct).text((60, 60), thing.glyph, font=font, embedded_color=True)

        scene = Scene((PlacedThing(thing, 0.5, 0.5, side / 256),), Background(colour, colour))
        ours = _content(np.asarray(render(scene, glyphs, 256), np.int16), colour.rgb)
        pillows = _content(np.asarray(direct, np.int16), colour.rgb)

        assert ours.shape == pillows.shape
        assert np.abs(ours - pillows).max() <= 2


def _content(pixels: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """The bounding box of all pixels that are not background."""
    rows, columns = np.nonzero((pixels != background).any(2))
    return pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def test_size_is_the_longer_side_as_a_fraction_of_the_frame_and_position_the_centre(glyphs: Glyphs) -> None:
    white = COLOURS[9]
    for thing in THINGS[::2]:
        for size, x, y in ((0.3, 0.25, 0.7), (0.6, 0.5, 0.5)):
            picture = render(Scene((PlacedThing(thing, x, y, size),), Background(white, white)), glyphs)
            rows, columns = np.nonzero((np.asarray(picture) != white.rgb).any(2))
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert max(height, width) == pytest.approx(size * 128, abs=2.5)
            assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(x * 128, abs=2)
            assert (rows.min() + rows.max() + 1) / 2 == pytest.approx(y * 128, abs=2)


def test_a_missing_font_file_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^font: there is no file .*missing\.ttf; expected NotoColorEmoji\.ttf$"):
        find_font(tmp_path / "missing.ttf")


def test_without_an_installed_font_the_error_names_the_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("recipes.mini.rendering.FONT_FOLDERS", (str(tmp_path),))

    with pytest.raises(
        RequestError, match=r"^font: NotoColorEmoji\.ttf is not in any .* fonts-noto-color-emoji .*--font"
    ):
        find_font()


def test_an_installed_font_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("recipes.mini.rendering.FONT_FOLDERS", (str(tmp_path),))
    (tmp_path / "noto").mkdir()
    (tmp_path / "noto" / "NotoColorEmoji.ttf").write_bytes(FONT.read_bytes())

    assert find_font() == tmp_path / "noto" / "NotoColorEmoji.ttf"


def test_the_test_font_is_small_licensed_and_draws_every_glyph_of_its_list(glyphs: Glyphs) -> None:
    assert FONT.stat().st_size < 400_000
    assert "SIL OPEN FONT LICENSE Version 1.1" in (FONTS / "OFL.txt").read_text(encoding="utf-8")
    assert len({glyphs[glyph].tobytes() for glyph in GLYPHS}) == len(GLYPHS) == len(THINGS)
    with pytest.raises(RequestError, match="no colour bitmap for 'x'"):
        glyphs["x"]

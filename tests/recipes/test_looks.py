"""What colours and distances are, on pictures whose content is known; and the charts of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from recipes.mini.curves import charts, main
from recipes.mini.looks import ALIKE, distances, ground_of, paint_of, thumbs
from recipes.mini.names import COLOURS


def disc(ground: tuple[int, int, int], paint: tuple[int, int, int], x: int = 64, y: int = 64) -> Image.Image:
    picture = Image.new("RGB", (128, 128), ground)
    ImageDraw.Draw(picture).ellipse((x - 24, y - 24, x + 24, y + 24), fill=paint)
    return picture


def test_the_paint_is_the_things_and_not_the_grounds():
    for ground in COLOURS:
        for paint in COLOURS:
            picture = disc(ground.rgb, paint.rgb)
            assert tuple(ground_of(picture)) == ground.rgb
            assert paint_of(picture) == (None if paint == ground else paint)


def test_distances_are_root_mean_squares_of_pixels_in_0_to_1():
    black, grey, white = (Image.new("RGB", (50, 50), (level,) * 3) for level in (0, 51, 255))

    found = distances(thumbs([black, grey]), thumbs([white, black]))

    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [0.8, 0.2]]))
    assert 0.0 < ALIKE < 0.2


def test_a_chart_goes_from_its_first_to_its_last_point():
    drawn = charts([("loss", [(0, 2.0), (50, 1.0), (100, 0.5)], None)])

    first, middle, last = drawn.split('points="')[1].split('"')[0].split()
    assert (first, last) == ("44.0,30.0", "288.0,164.0")
    assert middle.startswith("166.0,")
    assert float(middle.split(",")[1]) == pytest.approx(30 + 134 * (1 - 0.5 / 1.5), abs=0.1)


def test_a_run_without_logs_is_said_in_one_line(tmp_path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "log.jsonl: cannot be read" in capsys.readouterr().err


def test_a_line_breaks_where_what_is_measured_changed(tmp_path: Path):
    for stage in ("vae", "text", "unet"):
        (tmp_path / stage).mkdir()
        lines = [{"step": step, "validation loss": 1 / step} for step in (100, 200, 300, 400)]
        (tmp_path / stage / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert main([str(tmp_path), str(tmp_path / "curves"), "--anew", "text=250"]) == 0

    lines = re.findall(r'polyline points="([^"]*)"', (tmp_path / "curves.svg").read_text())
    assert [len(line.split()) for line in lines] == [4, 2, 2, 4]

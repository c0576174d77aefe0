"""The charts of a run's logs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from recipes.mini.charts import charts, main


def test_a_curve_runs_from_its_first_to_its_last_point():
    svg = charts([("loss", [(0, 2.0), (50, 1.0), (100, 0.5)], None)])

    first, middle, last = svg.split('points="')[1].split('"')[0].split()
    assert (first, last) == ("44.0,30.0", "288.0,164.0")
    assert middle.startswith("166.0,")
    assert float(middle.split(",")[1]) == pytest.approx(30 + 134 * (1 - 0.5 / 1.5), abs=0.1)


def test_a_run_without_logs_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "log.jsonl: cannot be read" in capsys.readouterr().err


def test_a_curve_is_interrupted_where_the_measure_changed(tmp_path: Path):
    for stage in ("vae", "text", "unet"):
        (tmp_path / stage).mkdir()
        lines = [{"step": step, "validation loss": 1 / step} for step in (100, 200, 300, 400)]
        (tmp_path / stage / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert main([str(tmp_path), str(tmp_path / "curves"), "--break", "text=250"]) == 0

    curves = re.findall(r'polyline points="([^"]*)"', (tmp_path / "curves.svg").read_text())
    assert [len(curve.split()) for curve in curves] == [4, 2, 2, 4]

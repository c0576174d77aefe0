"""Reports and comparisons as HTML: whole pages that load nothing, with the curves and samples of their runs."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gouache.app.training.charts import Curve, chart
from gouache.app.training.report import entry, report
from gouache.errors import GouacheError
from gouache.generate.picture import Picture
from gouache.training.run_settings import checked, template

VOID = {"meta", "img", "br", "line", "polyline", "circle"}


class Page(HTMLParser):
    """The elements of a page, checked for being closed in order, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def make_run(folder: Path, steps: tuple[int, ...] = (0, 10, 20), color: str = "red", **settings: Any) -> Path:
    """A run with a log, checkpoints and samples, without training."""
    folder.mkdir()
    train = {"steps": 20, "batch": 1, "learning_rate": 1e-3}
    chosen = checked({"model": {"name": "<b>mini", "sha256": "ab" * 32}, "train": train, **settings})
    (folder / "settings.toml").write_text(template(chosen))
    lines = [{"step": n, "rate": 1e-3, "loss": 1 / n, "norm": 1.0, "ema gap": 0.1} for n in range(1, 21)]
    lines += [{"step": n, "validation loss": 1 / n, "validation loss at 250": 2 / n, "validation loss at 750": 1 / n,
               "validation raw loss": 3 / n} for n in (10, 20)]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    change = {"step": 10, "name": "settings.learning_rate", "before": 1e-2, "after": 1e-3}
    for step in steps[1:]:
        (folder / f"step-{step:08d}").mkdir()
        values: dict[str, Any] = {"settings": {"learning_rate": 0.1 / step}} | {
            "step": step,
            "ranking": [[0.1, 10]],
            "changes": [change],
            "objective": {"data": "cd" * 20},
        }
        (folder / f"step-{step:08d}" / "state.json").write_text(json.dumps(values))
    for number, step in enumerate(steps):
        image = Image.new("RGB", (64, 64), color).point(lambda value, shade=20 * number: max(0, value - shade))
        request = {"prompt": "a <zorb>", "seed": 7}
        Picture(image, None, 7, {"request": request}, "").save(folder / "samples" / f"step-{step:08d}-00.png")  # type: ignore[arg-type]
    return folder


def test_a_report_is_one_page_that_loads_nothing(tmp_path: Path):
    page = report([entry(str(make_run(tmp_path / "run")))])
    parsed = Page(page)
    for _, attributes in parsed.found:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"https?:|@import|<script|<link", page)
    assert "color-scheme: light dark" in page

    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert titles == ["Loss", "Validation loss", "Validation loss by timestep", "Learning rate", "Gradient norm",
                      "Gap of averages and weights"]  # fmt: skip
    for expected in ("step 10: settings.learning_rate 0.01 -> 0.001", "<b>mini", "ab" * 32, "cd" * 20, "rank"):
        assert expected in parsed.text
    pictures = parsed.all("img")
    assert [each["title"] for each in pictures] == ["a <zorb>, seed 7"] * 3
    first = Image.open(io.BytesIO(base64.b64decode((pictures[0]["src"] or "").partition(",")[2])))
    assert first.size == (64, 64) and first.getpixel((5, 5))[0] > 200  # type: ignore[index]


def test_a_chart_draws_its_points_to_scale():
    drawn = chart("t", [Curve("a", [0, 50, 100], [0.0, 1.0, 0.5]), Curve("b", [100], [1.0])])
    (points,) = re.findall(r'points="(.*?)"', drawn)
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, each.split(","))) for each in points.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 > y2 > y1
    assert y0 - y1 == pytest.approx(2 * (y2 - y1), abs=0.2)  # down is less
    (x, y) = map(float, re.findall(r'<circle cx="(.*?)" cy="(.*?)"', drawn)[0])
    assert (x, y) == pytest.approx((x2, y1), abs=0.2)
    assert chart("t", [Curve("a", [], [])]) == ""


def test_a_comparison_shows_what_differs_with_equal_steps_beside_each_other(tmp_path: Path):
    make_run(tmp_path / "one", adapter={"rank": 4})
    make_run(tmp_path / "two", steps=(0, 20), color="blue", adapter={"rank": 8})
    page = report([entry(str(tmp_path / each)) for each in ("one", "two")])
    parsed = Page(page)
    settings = page[page.index("Settings that differ") :]
    assert re.findall(r"<tr><th>([^<]*)</th><td>([^<]*)</td><td>([^<]*)</td></tr>", settings) == [
        ("adapter.rank", "4", "8")
    ]
    loss = page[page.index("<figcaption>Loss") : page.index("</figure>")]
    assert loss.count('class="curve"') == 2 and ">one</span>" in loss and ">two</span>" in loss
    rows = re.findall(r"<tr><th>step (\d+)</th>(.*?)</tr>", page)
    assert [(step, [cell.count("<img") for cell in cells.split("</td>")[:2]]) for step, cells in rows] == [
        ("0", [1, 1]), ("10", [1, 0]), ("20", [1, 1]),
    ]  # fmt: skip
    assert len(parsed.all("img")) == 5


def test_checkpoints_of_one_run_are_compared_by_their_samples(tmp_path: Path):
    make_run(tmp_path / "run")
    page = report([entry(f"{tmp_path / 'run'}@{step}") for step in ("best", "last")])
    Page(page)
    assert (
        "Comparison of run, step 10, run, step 20" in page
        and "<th>train.learning_rate</th><td>0.01</td><td>0.005</td>" in page
    )
    (row,) = re.findall(r"<tr><th>newest</th>(.*?)</tr>", page)
    assert re.findall(r"<br>step (\d+)", row) == ["10", "20"]
    curves = re.findall(r'points="([^"]*)" stroke="#\w+" class="curve"', page[: page.index("</figure>")])
    assert [len(each.split()) for each in curves] == [10, 20]


@pytest.mark.parametrize(("text", "message"), [("@7", "no checkpoint"), ("@x", "not known"), ("x@last", "exist")])
def test_a_checkpoint_that_does_not_exist_is_one_line(text: str, message: str, tmp_path: Path):
    make_run(tmp_path / "run")
    with pytest.raises(GouacheError, match=message):
        entry(f"{tmp_path / 'run'}{text}")


def test_a_run_named_twice_is_one_line(tmp_path: Path):
    make_run(tmp_path / "run")
    with pytest.raises(GouacheError, match="run, step 20 is named twice"):
        report([entry(f"{tmp_path / 'run'}@{step}") for step in ("last", "20")])


def test_an_empty_run_has_a_report(tmp_path: Path):
    make_run(tmp_path / "run", steps=())
    (tmp_path / "run" / "log.jsonl").unlink()
    page = Page(report([entry(str(tmp_path / "run"))]))
    assert "not started" in page.text and "There are none." in page.text

"""`gouache dataset check` and `show`: output, JSON, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Command
from tests.data.pictures import save
from tests.data.tars import damaged, encoded, write


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for seed in range(3):
        save(tmp_path / f"data/{seed}.png", seed, (512, 512), txt=f"picture {seed}")
    return tmp_path / "data"


def test_a_good_data_set_ends_with_0(gouache: Command, data: Path):
    result = gouache("dataset", "check", data)
    assert result.code == 0 and result.err == ""
    lines = result.out.splitlines()
    assert lines[0] == f"{data}: 3 pictures, 3 per epoch" and lines[-1] == "0 faults, 0 remarks"
    assert ["512x512", "3", "3", "3", "0.0%"] in [line.split() for line in lines]


def test_faults_end_with_1(gouache: Command, data: Path):
    (data / "bad\x1b[31m.png").write_text("x")
    save(data / "copy.png", 1, (512, 512))
    for arguments in ((), ("--json",)):
        result = gouache("dataset", "check", data, *arguments)
        assert result.code == 1 and "\x1b" not in result.out + result.err
    findings = json.loads(result.out)["findings"]
    assert [each["kind"] for each in findings if each["fault"]] == ["unreadable", "duplicate"]
    text = gouache("dataset", "check", data).out
    assert "FAULT   duplicate: the same file several times: 1.png, copy.png" in text and "2 faults" in text


def test_options_reach_the_check(gouache: Command, data: Path):
    (data / "0.txt").write_text("cat " * 20)
    save(data.parent / "held/x.png", 2, (512, 512), txt="x")
    save(data.parent / "class/y.png", 8, (256, 512))
    result = gouache(
        "dataset", "check", data, "--resolution", "1024x768", "--step", "128", "--batch", "2", "--max-tokens", "10",
        "--holdout", data.parent / "held", "--reg", data.parent / "class", "--class", "dog", "--no-upscale", "--json",
    )  # fmt: skip
    report = json.loads(result.out)
    assert {each["kind"] for each in report["findings"]} == {"leak", "small", "long caption"}
    assert [each["size"] for each in report["buckets"]] == [[256, 512], [512, 512]]
    assert report["regularization"] == 3 and report["batches"] == 4


def test_sizes_are_those_of_the_data_set_or_of_the_model(gouache: Command, data: Path):
    toml = data.parent / "data.toml"
    dataset = "[[datasets]]\nresolution = 256\nbatch_size = 2\nenable_bucket = true\n"
    toml.write_text(f'{dataset}[[datasets.subsets]]\nimage_dir = "{data.as_posix()}"\nnum_repeats = 3\n')
    report = json.loads(gouache("dataset", "check", toml, "--json").out)
    assert [(each["size"], each["seen"], each["batches"]) for each in report["buckets"]] == [([256, 256], 9, 5)]
    report = json.loads(gouache("dataset", "check", toml, "--json", "--resolution", "128", "--batch", "1").out)
    assert [(each["size"], each["batches"]) for each in report["buckets"]] == [([128, 128], 9)]
    report = json.loads(gouache("dataset", "check", data, "--json", "-m", "mini").out)
    assert [each["size"] for each in report["buckets"]] == [[128, 128]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nothing"], "does not exist"),
        (["check", "."], "has no pictures"),
        (["check", "data", "--resolution", "big"], "resolution: "),
        (["check", "data", "--resolution", "5"], "resolution: "),
        (["check", "data", "--batch", "0"], "batch: "),
        (["check", "data", "--filter", "aesthetic"], "filter: "),
        (["check", "data", "--caption-column", "x", "--holdout", "none"], "none: does not exist"),
        (["show", "data"], "output: "),
        (["show", "data", "-o", "a.jpg"], "output: "),
        (["show", "data", "-o", "none/a.png"], "none/a.png: cannot be written"),
        (["show", "data", "-o", "a.png", "--count", "0"], "count: "),
    ],
)
def test_bad_input_is_one_line(gouache: Command, data: Path, arguments: list[str], message: str):
    (data.parent / "other").mkdir()
    if arguments[1] == ".":
        arguments = [arguments[0], "other"]
    result = gouache("dataset", *arguments)
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("error: ") and message in result.err and result.err.count("\n") == 1


def test_show_draws_the_pictures_with_their_captions(gouache: Command, data: Path, tmp_path: Path):
    save(data / "wide.png", 5, (400, 100))
    (data / "bad.png").write_text("x")
    sheet = tmp_path / "sheet.png"
    result = gouache("dataset", "show", data, "-o", sheet)
    assert result.code == 0 and f"{sheet}: 5 of 5 pictures" in result.out and "without a caption file" in result.out
    with Image.open(sheet) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24) or ()}
        assert picture.size[0] > 5 * 190 and len(colours) > 1000 and (250, 128, 114) in colours

    assert gouache("dataset", "show", data, "-o", sheet).code == 2
    again = gouache("dataset", "show", data, "-o", sheet, "--overwrite", "--count", "2")
    assert again.code == 0 and "2 of 5 pictures" in again.out
    with Image.open(sheet) as picture:
        assert picture.size[0] < 3 * 210


def test_show_prints_records_as_json(gouache: Command, data: Path):
    result = gouache("dataset", "show", data, "--json", "--trigger", "sks")
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [row["name"] for row in rows] == ["0.png", "1.png", "2.png"]
    assert rows[0]["captions"] == ["sks, picture 0"] and rows[0]["path"] == str(data / "0.png")


def test_the_second_check_reads_no_picture_again(gouache: Command, data: Path, monkeypatch: pytest.MonkeyPatch):
    from gouache.data import contents

    assert gouache("dataset", "check", data).code == 0
    monkeypatch.setattr(contents, "_content", None)
    assert gouache("dataset", "check", data).code == 0


def test_tar_shards_are_checked_and_shown(gouache: Command, tmp_path: Path):
    good = encoded(1, (600, 600))
    for shard in range(2):
        members = {
            f"{shard}{n}.png": damaged(good) if (shard, n) == (1, 2) else encoded(n, (512, 512)) for n in range(3)
        }
        write(tmp_path / f"set-{shard:02d}.tar", {**members, "note.txt": "no picture"})
    result = gouache("dataset", "check", tmp_path / "set-{00..01}.tar", "--json")
    report = json.loads(result.out)
    assert result.code == 1 and report["pictures"] == 6 and report["notes"] == ["2 samples without a picture left out"]
    found = [(each["kind"], each["pictures"]) for each in report["findings"]]
    assert ("unreadable", ["set-01.tar/12.png"]) in found
    assert ("duplicate", ["set-00.tar/01.png", "set-01.tar/11.png"]) in found

    shown = gouache("dataset", "show", tmp_path, "-o", tmp_path / "sheet.png")
    assert shown.code == 0 and "6 of 6 pictures" in shown.out
    compressed = tmp_path / "a.tar.gz"
    compressed.write_bytes(b"\x1f\x8b")
    refused = gouache("dataset", "check", compressed)
    assert refused.code == 2 and refused.err.count("\n") == 1 and "decompress it first" in refused.err

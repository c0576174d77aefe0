"""Metadata and TOML made at random: either a data set, or one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gouache.data import kohya_toml, metadata
from gouache.data.folders import read
from gouache.errors import FileError

from .pictures import save

NAMES = st.sampled_from(
    ["a.png", "a", "sub/b.png", "../a.png", "/a.png", "", ".", "..", "a\\..\\b", "\0", "\ud800", "é"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = st.sampled_from(
    ["file_name", "text", "caption", "tags", "mask", "image_path", "aesthetic", "conditioning_image"]
)
TOML_VALUES = st.sampled_from(
    ["true", "1", "-1", "0.5", "nan", "inf", "1e99", '"x"', '""', '".txt"', '"a"', "[]", "[1, 2]", "{}", "{a = 1}",
     "1979-05-27", '"\\u0000"', "[[1]]"]
)  # fmt: skip
TOML_KEYS = st.sampled_from(
    [*kohya_toml._SHARED, *kohya_toml._OF_ONE_SUBSET, *kohya_toml._OF_RUN, "subsets", "unknown", '""']
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    save(path / "a.png", txt="x")
    save(path / "sub/b.png")
    return path


def assert_one_line(error: FileError) -> None:
    assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 3000


def attempt(path: Path, folder: Path) -> None:
    try:
        dataset = read(path)
    except FileError as error:
        assert_one_line(error)
        return
    for record in dataset.records:
        assert record.path.is_relative_to(folder) and record.path.is_file() and record.captions
        assert all(isinstance(line, str) and "\n" not in line for line in record.captions)
    assert all(note.isprintable() for note in dataset.notes)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.dictionaries(COLUMNS, VALUES | NAMES, max_size=4), min_size=1, max_size=3), as_lines=st.booleans()
)
def test_any_metadata_is_read_or_refused(rows: list[dict[str, object]], as_lines: bool, folder: Path):
    path = folder / ("data.jsonl" if as_lines else "data.json")
    path.write_text(
        "\n".join(map(json.dumps, rows)) if as_lines else json.dumps({str(n): r for n, r in enumerate(rows)})
    )
    attempt(path, folder)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=60), suffix=st.sampled_from(metadata.SUFFIXES))
def test_any_bytes_are_read_or_refused(content: bytes, suffix: str, folder: Path):
    path = folder / f"bytes{suffix}"
    path.write_bytes(content)
    attempt(path, folder)


@settings(max_examples=300, deadline=None)
@given(**dict.fromkeys(("general", "dataset", "subset"), st.dictionaries(TOML_KEYS, TOML_VALUES, max_size=3)))
def test_any_toml_is_read_or_refused(general, dataset, subset, folder: Path):
    path = folder / "data.toml"
    tables = {"[general]": general, "[[datasets]]": dataset, "[[datasets.subsets]]": {"image_dir": '"sub"', **subset}}
    lines = [line for name, values in tables.items() for line in (name, *(f"{k} = {v}" for k, v in values.items()))]
    path.write_text("\n".join(lines))
    attempt(path, folder)


def test_names_with_control_characters_are_escaped_in_notes_and_errors(tmp_path: Path):
    folder = tmp_path / "e\x1b[31m"
    for name in ("a\x1b.png", "b\n.png", "c\u202e.heic", "10_x\x07/d.png"):
        if not name.endswith(".heic"):
            save(folder / name)
    (folder / "c\u202e.heic").write_text("x")
    (folder / "m\x1b.jsonl").write_text(
        json.dumps({"file_name": "a\x1b.png", "no\x1b": "x"}) + '\n{"file_name": "\x7f"}'
    )
    (folder / "t\x1b.toml").write_text(
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "../e\\u001b[31m"\ncache_info = true'
    )
    for path in (folder, folder / "m\x1b.jsonl", folder / "t\x1b.toml"):
        notes = read(path).notes
        assert notes and all(note.isprintable() for note in notes)
    (folder / "t\x1b.toml").write_text('"\\u001b" = 1\n[[datasets]]\n[[datasets.subsets]]')
    with pytest.raises(FileError) as caught:
        read(folder / "t\x1b.toml")
    assert_one_line(caught.value)

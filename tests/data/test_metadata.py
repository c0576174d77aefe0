"""Metadata files: as Hugging Face's documentation of imagefolder and kohya's scripts write them, and hostile ones."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest

from gouache.data.dataset import DataSet
from gouache.data.folders import read
from gouache.data.subset import Subset
from gouache.errors import FileError

from .pictures import save


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def captions(dataset: DataSet) -> dict[str, tuple[str, ...]]:
    return {each.name: each.captions for each in dataset.records}


@pytest.mark.parametrize("as_csv", [False, True])
def test_hugging_face_image_folders_have_captions_and_scores(as_csv: bool, tmp_path: Path):
    for name in ("0001.png", "sub/0002.png"):
        save(tmp_path / name)
    rows = [
        {"file_name": "0001.png", "text": "a golden retriever, outside", "aesthetic": 5.5, "punsafe": 0.01},
        {"file_name": "sub/0002.png", "text": "12", "aesthetic": 6, "punsafe": ""},
    ]
    if as_csv:
        with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_lines(tmp_path / "metadata.jsonl", *rows)

    dataset = read(tmp_path, Subset("sks"))
    assert captions(dataset) == {"0001.png": ("sks, a golden retriever, outside",), "sub/0002.png": ("sks, 12",)}
    assert [each.scores for each in dataset.records] == [{"aesthetic": 5.5, "punsafe": 0.01}, {"aesthetic": 6.0}]
    assert dataset.notes == []
    file = next(tmp_path.glob("metadata.*"))
    assert captions(read(file, Subset("sks"))) == captions(dataset)


def test_metadata_in_each_split_is_read_for_train_alone(tmp_path: Path):
    for split in ("train", "test"):
        save(tmp_path / split / "a.png")
        write_lines(tmp_path / split / "metadata.jsonl", {"file_name": "a.png", "text": split})
    assert captions(read(tmp_path)) == {"train/a.png": ("train",)}


def test_masks_and_conditioning_pictures_are_not_trained_on(tmp_path: Path):
    for name in ("a.png", "masks/a.png", "edges/a.png"):
        save(tmp_path / name)
    write_lines(
        tmp_path / "metadata.jsonl",
        {"file_name": "a.png", "text": "x", "mask": "masks/a.png", "conditioning_image": "edges/a.png"},
    )
    dataset = read(tmp_path)
    (record,) = dataset.records
    assert (record.mask, record.conditioning) == (tmp_path / "masks/a.png", tmp_path / "edges/a.png")
    assert dataset.notes == []


def test_the_caption_column_is_found_or_named(tmp_path: Path):
    save(tmp_path / "a.png")
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "blip": "by blip", "caption": ["one", "two\n"]})
    assert captions(read(tmp_path)) == {"a.png": ("one", "two")}
    assert captions(read(tmp_path, caption_column="blip")) == {"a.png": ("by blip",)}
    with pytest.raises(FileError, match="has no column 'git'; it has file_name, blip, caption"):
        read(tmp_path, caption_column="git")

    write_lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "blip": "by blip"})
    dataset = read(tmp_path)
    assert captions(dataset) == {"a.png": ("",)} and "it has file_name, blip" in dataset.notes[0]


def test_a_null_caption_is_none_and_an_empty_one_is_empty(tmp_path: Path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    rows = [{"file_name": "a.png", "text": None}, {"file_name": "b.png", "text": ""}]
    write_lines(tmp_path / "metadata.jsonl", *rows)
    assert captions(read(tmp_path, Subset("sks", "dog"))) == {"a.png": ("sks dog",), "b.png": ("sks",)}


def test_kohya_json_names_pictures_by_path_or_without_suffix(tmp_path: Path):
    for name in ("a.png", "sub/b.jpg", "c.webp"):
        save(tmp_path / name)
    file = tmp_path / "meta_lat.json"
    entries = {
        "a": {"caption": "a cat", "tags": "cat, mat", "train_resolution": [512, 768]},
        "sub/b": {"tags": "dog"},
        str(tmp_path / "c.webp"): {"caption": "a bird"},
    }
    file.write_text(json.dumps(entries))
    assert captions(read(file)) == {"a.png": ("a cat, cat, mat",), "sub/b.jpg": ("dog",), "c.webp": ("a bird",)}


def test_kohya_json_lines(tmp_path: Path):
    save(tmp_path / "a.png")
    row = {"image_path": str(tmp_path / "a.png"), "caption": "a cat", "tags": ["cat", "mat"], "image_size": [8, 8]}
    dataset = read(write_lines(tmp_path / "data.jsonl", row))
    assert captions(dataset) == {"a.png": ("a cat, cat, mat",)} and dataset.records[0].scores == {}


def test_full_paths_through_a_link_are_found(tmp_path: Path):
    save(tmp_path / "real/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_lines(tmp_path / "real/data.jsonl", {"image_path": str(tmp_path / "real/a.png"), "caption": "x"})
    assert captions(read(tmp_path / "link/data.jsonl")) == {"a.png": ("x",)}


def test_tags_of_a_data_set_that_is_not_kohyas_are_not_part_of_its_captions(tmp_path: Path):
    save(tmp_path / "a.png")
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "a cat", "tags": "animal"})
    assert captions(read(tmp_path)) == {"a.png": ("a cat",)}


def test_pictures_that_are_missing_or_not_described_are_noted(tmp_path: Path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    rows = [{"file_name": name, "text": "x"} for name in ("a.png", "gone.png")]
    write_lines(tmp_path / "metadata.jsonl", *rows)
    dataset = read(tmp_path)
    assert list(captions(dataset)) == ["a.png"]
    assert dataset.notes == [
        "metadata.jsonl: 1 of 2 pictures missing: gone.png",
        "1 picture left out, not in metadata.jsonl: b.png",
    ]
    (tmp_path / "a.png").unlink()
    with pytest.raises(FileError, match=r"names 2 pictures, and none is there: a\.png, gone\.png"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "sub/../../secret.png", "/etc/passwd", "..\\secret.png", "C:\\secret.png", "//x/y.png", ".."],
)
@pytest.mark.parametrize("column", ["file_name", "mask"])
def test_names_that_lead_out_of_the_folder_are_refused(name: str, column: str, tmp_path: Path):
    save(tmp_path / "secret.png")
    save(tmp_path / "data/a.png")
    row = {"file_name": "a.png", "text": "x"} | {column: name}
    write_lines(tmp_path / "data/metadata.jsonl", row)
    with pytest.raises(FileError, match=r"line 1: names .* outside the folder"):
        read(tmp_path / "data")


def test_hidden_files_and_what_is_no_picture_cannot_be_named(tmp_path: Path):
    save(tmp_path / "a.png")
    save(tmp_path / ".b.png")
    (tmp_path / "c.txt").write_text("secret")
    rows = [{"file_name": name} for name in ("./sub/../a.png", ".b.png", "c.txt", "c", ".")]
    write_lines(tmp_path / "metadata.jsonl", *rows)
    dataset = read(tmp_path)
    assert list(captions(dataset)) == ["a.png"] and "4 of 5 pictures missing" in dataset.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png"}\n{"file_name":', "line 2: is not JSON"),
        ("metadata.jsonl", b'["a.png"]', "line 1: contains a list; expected an object"),
        ("metadata.jsonl", b'{"text": "x"}', "line 1: has no picture; expected a column file_name"),
        ("metadata.jsonl", b'{"file_name": 5}', "line 1: file_name is a number"),
        ("metadata.jsonl", b'{"file_name": "a\\u0000.png"}', "file_name has NUL"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": {"a": 1}}', "line 1: the caption is an object"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": [["a"]]}', "line 1: the caption is a list"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "a\\u0000b"}', "NUL"),
        ("metadata.jsonl", b"\xff\xfe\x00", "is not text in UTF-8"),
        ("metadata.jsonl", b"[" * 100_000, "nested"),
        ("metadata.jsonl", b'{"file_name": "a.png", "x": ' + b"9" * 5000 + b"}", "5000 digits"),
        ("metadata.csv", b'file_name,text\na.png,"' + b"x" * 200_000 + b'"\n', "is not CSV"),
        ("metadata.csv", b"name,text\na.png,x\n", "line 2: has no picture"),
        ("kohya.json", b'{"a": "text"}', "entry 'a': contains text"),
        ("kohya.json", b"5", "contains a number"),
        ("kohya.json", b"{}", "has no pictures"),
    ],
)
def test_damaged_metadata_is_one_line(name: str, content: bytes, message: str, tmp_path: Path):
    save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_scores_are_finite_numbers(tmp_path: Path):
    save(tmp_path / "a.png")
    line = '{"file_name": "a.png", "a": NaN, "b": 1e999, "c": true, "d": "0.5", "e": "x", "f": null, "g": [1], "h": 3}'
    (tmp_path / "metadata.jsonl").write_text(line)
    assert read(tmp_path).records[0].scores == {"d": 0.5, "h": 3.0}


def test_many_pictures_are_listed_quickly(tmp_path: Path):
    save(tmp_path / "0.png")
    for number in range(1, 5000):
        (tmp_path / f"{number}.png").hardlink_to(tmp_path / "0.png")
    write_lines(tmp_path / "metadata.jsonl", *({"file_name": f"{n}.png", "text": f"{n}"} for n in range(5000)))
    started = time.perf_counter()
    assert len(read(tmp_path).records) == 5000
    assert time.perf_counter() - started < 10

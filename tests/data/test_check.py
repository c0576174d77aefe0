"""The report on data sets whose flaws are known because they were made here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from gouache.data.buckets import Buckets
from gouache.data.check import Finding, Report, check
from gouache.data.folders import read
from gouache.data.record import CaptionOptions, PictureOptions
from gouache.data.subset import Subset
from gouache.prompts.tokenizer import Tokenizer

from .pictures import photo, save

BUCKETS = Buckets((128, 128), step=32)


def report(folder: Path, buckets: Buckets = BUCKETS, subset: Subset | None = None, **options) -> Report:
    return check(read(folder, subset or Subset()), buckets, **options)


def found(result: Report, kind: str) -> list[Finding]:
    return [each for each in result.findings if each.kind == kind]


def test_a_good_data_set_has_no_findings(tmp_path: Path):
    for seed in range(4):
        save(tmp_path / f"{seed}.png", seed, (160, 128), txt=f"picture {seed}")
    result = report(tmp_path, tokenizer=Tokenizer(), cache=tmp_path / "cache")
    assert result.findings == [] and (result.pictures, result.seen) == (4, 4)
    assert json.loads(json.dumps(result.to_json()))["pictures"] == 4


def test_pictures_that_cannot_be_read_are_faults(tmp_path: Path):
    save(tmp_path / "a.png", 1, (160, 128), txt="x")
    good = save(tmp_path / "b.png", 2, (160, 128), txt="x").read_bytes()
    (tmp_path / "b.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "c.jpg").write_text("<html>")
    os.mkfifo(tmp_path / "d.png")
    result = report(tmp_path)
    assert [each.pictures for each in found(result, "unreadable")] == [["b.png"], ["c.jpg"], ["d.png"]]
    assert all(each.fault and "\n" not in each.message for each in found(result, "unreadable"))
    assert result.pictures == 4 and result.seen == 1


def test_copies_are_found(tmp_path: Path):
    save(tmp_path / "a.png", 1, (160, 128), txt="x")
    save(tmp_path / "b.png", 1, (160, 128), txt="y")
    ImageOps.mirror(photo(1, (320, 256))).save(tmp_path / "c.jpg")
    save(tmp_path / "d.png", 2, (160, 128))
    save(tmp_path / "e.png", 2, (160, 128))
    result = report(tmp_path)
    assert [each.pictures for each in found(result, "duplicate")] == [["a.png", "b.png"], ["d.png", "e.png"]]
    assert [each.pictures for each in found(result, "near duplicate")] == [["a.png", "b.png", "c.jpg"]]
    assert [each.fault for each in result.findings if "duplicate" in each.kind] == [True, True, False]


def test_one_picture_with_two_captions_is_no_copy(tmp_path: Path):
    save(tmp_path / "a.png", 1, (160, 128))
    rows = [{"file_name": "a.png", "text": text} for text in ("one", "two")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert report(tmp_path).findings == []


def test_pictures_that_are_also_held_out_leak(tmp_path: Path):
    for seed in range(3):
        save(tmp_path / f"train/{seed}.png", seed, (160, 128), txt="x")
    save(tmp_path / "held/other.png", 9, (160, 128), txt="x")
    save(tmp_path / "held/same.jpg", 1, (320, 256), txt="x")
    (tmp_path / "held/bad.png").write_text("x")
    result = report(tmp_path / "train", held_out=read(tmp_path / "held"))
    (leak,) = found(result, "leak")
    assert leak.pictures == ["1.png", "same.jpg"] and leak.fault
    assert [each.pictures for each in found(result, "unreadable")] == [["bad.png"]]


def test_small_pictures_and_what_is_cut_off_are_remarked(tmp_path: Path):
    save(tmp_path / "small.png", 1, (64, 64), txt="x")
    save(tmp_path / "long.png", 2, (800, 100), txt="x")
    result = report(tmp_path)
    assert found(result, "small")[0].pictures == ["small.png"] and "up to 2.0" in found(result, "small")[0].message
    (crop,) = found(result, "crop")
    share = 1 - 4 / 8  # of 8:1, the longest bucket 256x64 keeps 4:1
    assert crop.pictures == ["long.png"] and f"{share:.0%}" in crop.message and not crop.fault


def test_captions_that_other_programs_cut_off_are_remarked(tmp_path: Path):
    save(tmp_path / "a.png", 1, (160, 128), txt=", ".join(["cat"] * 37) + ", a dog behind")
    save(tmp_path / "b.png", 2, (160, 128), txt=" ".join(["cat"] * 75))
    save(tmp_path / "c.png", 3, (160, 128), txt="short\n" + "dog " * 90)
    result = report(tmp_path, tokenizer=Tokenizer())
    (cut,) = found(result, "long caption")
    assert cut.pictures == ["a.png"] and not cut.fault
    assert (
        "the longest has 77: training uses all of it, in 2 chunks of 75" in cut.message
        and '"dog behind"' in cut.message
    )
    assert found(report(tmp_path, tokenizer=Tokenizer(), max_tokens=150), "long caption") == []

    wild = report(
        tmp_path, subset=Subset(caption_options=CaptionOptions(wildcard=True, prefix="p")), tokenizer=Tokenizer()
    )
    assert found(wild, "long caption")[0].pictures == ["a.png", "b.png", "c.png"]


def test_the_longest_alternative_counts(tmp_path: Path):
    save(tmp_path / "a.png", 1, (160, 128), txt="{" + "|".join(["cat " * 30] * 5) + "|" + "dog " * 74 + "}")
    wild = Subset(caption_options=CaptionOptions(wildcard=True))
    assert found(report(tmp_path, subset=wild, tokenizer=Tokenizer()), "long caption") == []
    assert found(report(tmp_path, subset=wild, tokenizer=Tokenizer(), max_tokens=73), "long caption")


def test_empty_captions_are_remarked(tmp_path: Path):
    save(tmp_path / "a.png", 1, (160, 128), txt="")
    save(tmp_path / "b.png", 2, (160, 128), txt="x")
    assert found(report(tmp_path), "caption")[0].pictures == ["a.png"]
    assert found(report(tmp_path, subset=Subset("sks")), "caption") == []


def test_masks_are_measured(tmp_path: Path):
    for number in range(4):
        save(tmp_path / f"{number}.png", number, (160, 128), txt="x")
    half = Image.new("L", (160, 128))
    half.paste(255, (0, 0, 80, 128))
    half.save(tmp_path / "0-masklabel.png")
    Image.new("L", (80, 64)).save(tmp_path / "1-masklabel.png")
    Image.new("L", (50, 50)).save(tmp_path / "2-masklabel.png")
    masks = found(report(tmp_path), "mask")
    assert [(each.pictures, each.fault) for each in masks] == [
        (["2.png"], True),
        (["1.png"], True),
        (["0.png", "1.png"], False),
    ]
    assert "2 of 4 pictures with a mask; 25% of their area" in masks[2].message


def test_alpha_masks_are_measured(tmp_path: Path):
    picture = photo(1, (160, 128)).convert("RGBA")
    picture.putalpha(64)
    picture.save(tmp_path / "a.png")
    save(tmp_path / "b.png", 2, (160, 128))
    (mask,) = found(report(tmp_path, subset=Subset("x", picture_options=PictureOptions(alpha_mask=True))), "mask")
    assert mask.pictures == ["a.png"] and "1 of 2 pictures with a mask; 25%" in mask.message


@pytest.mark.parametrize("batch", [1, 4])
def test_the_bucket_table_counts_what_an_epoch_shows(batch: int, tmp_path: Path):
    for number, size in enumerate([(128, 128)] * 3 + [(256, 64)] * 2):
        save(tmp_path / f"5_a/{number}.png", number, size)
    save(tmp_path / "2_b/x.png", 9, (64, 256))
    result = report(tmp_path, batch=batch)
    table = {each.size: (each.pictures, each.seen, each.batches, each.lost) for each in result.buckets}
    rounded = {1: (2, 15, 10), 4: (1, 4, 3)}[batch]
    assert table == {
        (64, 256): (1, 2, rounded[0], 0),
        (128, 128): (3, 15, rounded[1], 0),
        (256, 64): (2, 10, rounded[2], 0),
    }
    assert (result.pictures, result.seen, result.batches) == (6, 27, sum(rounded))


def test_regularization_pictures_are_balanced_with_the_others(tmp_path: Path):
    save(tmp_path / "img/4_a/a.png", 1, (128, 128))
    for number in range(8):
        save(tmp_path / f"reg/1_b/{number}.png", 10 + number, (128, 128))
    result = report(tmp_path)
    assert (result.seen, result.regularization) == (8, 4)


def test_pictures_with_a_resolution_of_their_own_have_their_own_buckets(tmp_path: Path):
    save(tmp_path / "a/a.png", 1, (300, 300), txt="x")
    subset = '[[datasets.subsets]]\nimage_dir = "a"\n'
    toml = tmp_path / "data.toml"
    toml.write_text(f"[[datasets]]\nresolution = 64\n{subset}[[datasets]]\nresolution = 256\n{subset}")
    result = report(toml)
    assert [each.size for each in result.buckets] == [(64, 64), (256, 256)] and result.findings == []

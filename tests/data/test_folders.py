"""Folders as users of kohya's scripts, diffusers and OneTrainer have them, and hostile ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from gouache.data.dataset import DataSet
from gouache.data.folders import read
from gouache.data.record import CaptionOptions
from gouache.data.subset import Subset
from gouache.errors import FileError

from .pictures import save


def captions(dataset: DataSet) -> dict[str, str | tuple[str, ...]]:
    """Name -> caption, or the lines of it if there are several."""
    return {each.name: each.captions[0] if len(each.captions) == 1 else each.captions for each in dataset.records}


def test_a_plain_folder_is_searched_with_its_sub_folders(tmp_path: Path):
    save(tmp_path / "b.png", txt="a cat\n")
    save(tmp_path / "A.JPG", caption="\ufeffa dog, ärgerlich\r\n\r\nsecond line \r\n")
    save(tmp_path / "deep/er/c.webp", txt="  \n")
    save(tmp_path / ".hidden/d.png")
    (tmp_path / "notes.md").write_text("not a picture")

    dataset = read(tmp_path)
    assert captions(dataset) == {
        "A.JPG": ("a dog, ärgerlich", "second line"),
        "b.png": "a cat",
        "deep/er/c.webp": "",
    }
    assert dataset.notes == [] and dataset.settings == {}
    assert dataset.records[2].path == tmp_path / "deep/er/c.webp" and dataset.records[2].repeats == 1


def test_txt_wins_over_caption_and_a_note_says_so_only_if_they_differ(tmp_path: Path):
    save(tmp_path / "a.png", txt="new", caption="old")
    save(tmp_path / "b.png", txt="same", caption="same\n")

    dataset = read(tmp_path)
    assert captions(dataset) == {"a.png": "new", "b.png": "same"}
    assert len(dataset.notes) == 1 and "a.png" in dataset.notes[0] and "b.png" not in dataset.notes[0]


@pytest.mark.parametrize(
    ("trigger", "class_word", "expected"),
    [("", "", ""), ("sks", "", "sks"), ("sks", "dog", "sks dog"), ("", "dog", "dog")],
)
def test_pictures_without_captions_have_the_trigger_and_class_word(trigger, class_word, expected, tmp_path: Path):
    save(tmp_path / "a.png")
    dataset = read(tmp_path, Subset(trigger, class_word))
    assert captions(dataset) == {"a.png": expected} and "no caption files" in dataset.notes[0]


def test_the_trigger_is_put_in_front_of_captions_without_it(tmp_path: Path):
    for number, text in enumerate(("a dog", "a photo of SKS dog", "sksy dog", "", "dog, sks\nline two")):
        save(tmp_path / f"{number}.png", txt=text)
    assert list(captions(read(tmp_path, Subset("sks"))).values()) == [
        "sks, a dog", "a photo of SKS dog", "sks, sksy dog", "sks", ("dog, sks", "sks, line two"),
    ]  # fmt: skip


def test_missing_captions_are_noted(tmp_path: Path):
    save(tmp_path / "a.png", txt="x")
    save(tmp_path / "b.png")
    assert read(tmp_path).notes == ["1 of 2 pictures without a caption file: b.png"]


@pytest.mark.parametrize("end", [".mask.png", "-mask.jpg", "_mask.webp"])
def test_masks_next_to_pictures(end: str, tmp_path: Path):
    save(tmp_path / "a.b.jpg", txt="x")
    mask = save(tmp_path / f"a.b{end}")
    assert [(each.name, each.mask) for each in read(tmp_path).records] == [("a.b.jpg", mask)]


def test_onetrainer_masks_and_conditions_belong_to_their_pictures(tmp_path: Path):
    save(tmp_path / "a.jpg", txt="x")
    save(tmp_path / "a-masklabel.png")
    save(tmp_path / "a-condlabel.png")
    save(tmp_path / "lonely-masklabel.png", txt="y")

    first, second = read(tmp_path).records
    assert (first.name, first.mask, first.conditioning) == (
        "a.jpg",
        tmp_path / "a-masklabel.png",
        tmp_path / "a-condlabel.png",
    )
    assert (second.name, second.mask) == ("lonely-masklabel.png", None)


def test_pictures_in_other_formats_are_noted(tmp_path: Path):
    save(tmp_path / "a.png", txt="x")
    (tmp_path / "b.heic").write_bytes(b"x")
    assert read(tmp_path).notes == ["1 picture left out, in formats that are not read: b.heic"]


def test_kohya_folders_have_repeats_and_class_tokens(tmp_path: Path):
    save(tmp_path / "10_sks dog/a.png")
    save(tmp_path / "10_sks dog/b.png", caption="sks dog in a park")
    save(tmp_path / "3_1girl_blue/c.png")
    save(tmp_path / "0_off/d.png")
    save(tmp_path / "other/e.png")
    save(tmp_path / "10_sks dog/inner/f.png")

    dataset = read(tmp_path)
    found = {each.name: (each.captions[0], each.repeats, each.regularization) for each in dataset.records}
    assert found == {
        "10_sks dog/a.png": ("sks dog", 10, False),
        "10_sks dog/b.png": ("sks dog in a park", 10, False),
        "3_1girl_blue/c.png": ("1girl_blue", 3, False),
    }
    text = "\n".join(dataset.notes)
    assert "10_sks dog: 2 pictures, each seen 10 times per epoch" in text and "0_off: not used" in text
    assert "2 pictures left out" in text and "other/e.png" in text and "inner/f.png" in text


def test_img_and_reg_folders_are_subject_and_class(tmp_path: Path):
    save(tmp_path / "img/5_sks dog/a.png")
    save(tmp_path / "reg/1_dog/b.png")
    (tmp_path / "model").mkdir()
    (tmp_path / "log").mkdir()

    found = {each.name: (each.captions[0], each.repeats, each.regularization) for each in read(tmp_path).records}
    assert found == {"img/5_sks dog/a.png": ("sks dog", 5, False), "reg/1_dog/b.png": ("dog", 1, True)}


def test_a_folder_of_class_pictures_gets_no_trigger(tmp_path: Path):
    save(tmp_path / "mine/a.png")
    save(tmp_path / "class/b.png")
    save(tmp_path / "class/c.png", txt="a dog on grass")
    save(tmp_path / "kohya/2_dog/d.png")
    subset = Subset("sks", "dog")
    for regularization, expected in (("class", ["dog", "a dog on grass"]), ("kohya", ["dog"])):
        dataset = read(tmp_path / "mine", subset, regularization=tmp_path / regularization)
        assert [each.captions[0] for each in dataset.records] == ["sks dog", *expected]
        assert [each.regularization for each in dataset.records] == [False] + [True] * len(expected)


def test_a_number_in_the_name_of_the_folder_itself_is_noted(tmp_path: Path):
    save(tmp_path / "10_sks dog/a.png", txt="x")
    dataset = read(tmp_path / "10_sks dog")
    assert dataset.records[0].repeats == 1 and "parent folder" in dataset.notes[0]


def test_validation_and_test_folders_next_to_train_are_not_trained_on(tmp_path: Path):
    for name in ("train/a.png", "test/b.png", "validation/x/c.png"):
        save(tmp_path / name, txt="x")
    dataset = read(tmp_path)
    assert list(captions(dataset)) == ["train/a.png"] and "not test, validation" in dataset.notes[0]
    save(tmp_path / "d.png", txt="x")
    assert len(read(tmp_path).records) == 4


def test_options_apply_to_every_picture(tmp_path: Path):
    save(tmp_path / "2_a/a.png")
    options = CaptionOptions(shuffle=True)
    assert read(tmp_path, Subset(caption_options=options)).records[0].caption_options == options


def test_links_are_followed_and_endless_ones_end(tmp_path: Path):
    save(tmp_path / "data/a.png", txt="x")
    save(tmp_path / "elsewhere/b.png", txt="y")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/self").symlink_to("self")
    (tmp_path / "data/c.png").symlink_to("c.png")

    assert list(captions(read(tmp_path / "data"))) == ["a.png", "c.png", "again/b.png"]


def test_folders_that_are_too_deep_are_refused(tmp_path: Path):
    save(tmp_path / "/".join(["d"] * 40) / "a.png")
    with pytest.raises(FileError, match="deep"):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfea\x00", b"caf\xe9", b"a\0b", b"x" * 1_000_001])
def test_a_caption_that_is_not_text_is_one_line(content: bytes, tmp_path: Path):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(FileError, match=r"a\.txt: ") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_a_caption_that_is_a_pipe_or_folder_does_not_hang(make, tmp_path: Path):
    save(tmp_path / "a.png")
    make(tmp_path / "a.txt")
    if make is Path.mkdir:  # a folder is not a caption
        assert captions(read(tmp_path)) == {"a.png": ""}
    else:
        with pytest.raises(FileError, match="named pipe"):
            read(tmp_path)


def test_folders_without_pictures_and_what_is_no_folder_are_one_line(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    file = save(tmp_path / "pictures/a.png")
    cases = {
        tmp_path / "empty": "does not exist",
        file: "is a file",
        tmp_path / "a\0b": "not a possible",
    }
    (tmp_path / "none").mkdir()
    (tmp_path / "none/a.txt").write_text("x")
    cases[tmp_path / "none"] = "has no pictures"
    for path, message in cases.items():
        with pytest.raises(FileError, match=message):
            read(path)
    with pytest.raises(FileError, match="has no pictures"):
        read(tmp_path / "pictures", regularization=tmp_path / "none")


def test_the_identity_depends_on_pixels_and_captions_and_not_on_names_and_order(tmp_path: Path):
    save(tmp_path / "one/a.png", 1, txt="x")
    save(tmp_path / "one/b.png", 2, txt="y")
    save(tmp_path / "two/z.png", 1, txt="x")
    save(tmp_path / "two/c.png", 2, txt="y")
    one, two = read(tmp_path / "one").identity(), read(tmp_path / "two").identity(tmp_path / "cache")
    assert one == two and len(one) == 64

    (tmp_path / "two/c.txt").write_text("z")
    assert read(tmp_path / "two").identity(tmp_path / "cache") != one
    (tmp_path / "two/c.txt").write_text("y")
    Image.new("RGB", (8, 8)).save(tmp_path / "two/c.png")
    assert read(tmp_path / "two").identity(tmp_path / "cache") != one

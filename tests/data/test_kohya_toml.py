"""kohya's TOML: the example of its documentation, every key, and files that are not such."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gouache.data.folders import read
from gouache.data.record import CaptionOptions, PictureOptions
from gouache.data.subset import Subset
from gouache.errors import FileError

from .pictures import save

EXAMPLE = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1

# a DreamBooth-style data set
[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'hoge'
  class_tokens = 'hoge girl'

  [[datasets.subsets]]
  image_dir = 'fuga'
  class_tokens = 'fuga boy'
  keep_tokens = 3

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'reg'
  class_tokens = 'human'
  keep_tokens = 1

# a fine-tuning data set
[[datasets]]
resolution = [768, 640]
batch_size = 2

  [[datasets.subsets]]
  image_dir = 'piyo'
  metadata_file = 'piyo/piyo_md.json'
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("hoge", "fuga", "reg", "piyo"):
        save(tmp_path / name / "a.png")
    (tmp_path / "fuga/a.txt").write_text("fuga boy, smile")
    (tmp_path / "fuga/a.caption").write_text("not this one")
    (tmp_path / "piyo/piyo_md.json").write_text(json.dumps({"a": {"caption": "a bird"}}))
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "data.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_example_of_the_documentation(folder: Path):
    dataset = read(write(folder, EXAMPLE))
    found = {
        each.name: (each.captions[0], each.caption_options.keep_tokens, each.regularization, each.resolution)
        for each in dataset.records
    }
    assert found == {
        "hoge/a.png": ("hoge girl", 2, False, (512, 512)),
        "fuga/a.png": ("fuga boy, smile", 3, False, (512, 512)),
        "reg/a.png": ("human", 1, True, (512, 512)),
        "piyo/a.png": ("a bird", 1, False, (768, 640)),
    }
    assert all(each.caption_options.shuffle for each in dataset.records)
    assert dataset.settings == {}
    assert "data.toml: batch_size differs between data sets; those of the run are used" in dataset.notes


def test_every_key(folder: Path):
    save(folder / "masks/a.jpg")
    save(folder / "hoge/deep/b.png")
    text = """
    [[datasets]]
    resolution = [512, 768]
    batch_size = 3
    enable_bucket = true
    bucket_no_upscale = true
    bucket_reso_steps = 32
    min_bucket_reso = 128
    max_bucket_reso = 768
    validation_split = 0.1
    validation_seed = 7
    network_multiplier = 1.0
      [[datasets.subsets]]
      image_dir = "hoge"
      num_repeats = 4
      class_tokens = "x"
      caption_extension = ".cap"
      conditioning_data_dir = "masks"
      shuffle_caption = true
      keep_tokens = 2
      keep_tokens_separator = "|||"
      caption_separator = ";"
      secondary_separator = ";;"
      caption_prefix = "p"
      caption_suffix = "s"
      caption_dropout_rate = 0.1
      caption_dropout_every_n_epochs = 5
      caption_tag_dropout_rate = 0.2
      enable_wildcard = true
      token_warmup_min = 2
      token_warmup_step = 100
      flip_aug = true
      color_aug = true
      random_crop = true
      alpha_mask = true
      face_crop_aug_range = [1.0, 2.0]
      resize_interpolation = "area"
      custom_attributes = {a = 1}
    """
    dataset = read(write(folder, text))
    (record,) = dataset.records
    assert record.caption_options == CaptionOptions(
        shuffle=True, keep_tokens=2, keep_tokens_separator="|||", separator=";", secondary_separator=";;",
        dropout=0.1, dropout_every_epochs=5, tag_dropout=0.2, prefix="p", suffix="s", wildcard=True,
        warmup_min=2, warmup_steps=100,
    )  # fmt: skip
    assert record.picture_options == PictureOptions(flip=True, random_crop=True, color=True, alpha_mask=True)
    assert (record.repeats, record.captions, record.mask) == (4, ("x",), folder / "masks/a.jpg")
    assert record.resolution is None
    assert dataset.settings == {
        "resolution": [512, 768], "batch_size": 3, "enable_bucket": True, "bucket_no_upscale": True,
        "bucket_reso_steps": 32, "min_bucket_reso": 128, "max_bucket_reso": 768, "validation_split": 0.1,
        "validation_seed": 7,
    }  # fmt: skip
    notes = "\n".join(dataset.notes)
    assert "masks of 1 of 1 picture" in notes and "deep/b.png" in notes
    for key in ("face_crop_aug_range", "resize_interpolation", "custom_attributes", "network_multiplier"):
        assert key in notes


def test_one_folder_in_two_data_sets_is_used_at_both_resolutions(folder: Path):
    subset = '[[datasets.subsets]]\nimage_dir = "hoge"\n'
    dataset = read(write(folder, f"[[datasets]]\nresolution = 512\n{subset}[[datasets]]\nresolution = 1024\n{subset}"))
    assert [each.resolution for each in dataset.records] == [(512, 512), (1024, 1024)]


def test_defaults_and_trigger_apply_where_the_file_says_nothing(folder: Path):
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "fuga"\nkeep_tokens = 3\n'
    defaults = Subset("sks", caption_options=CaptionOptions(shuffle=True, keep_tokens=1))
    (record,) = read(write(folder, text), defaults).records
    assert record.caption_options == CaptionOptions(shuffle=True, keep_tokens=3)
    assert record.captions == ("sks, fuga boy, smile",)  # .txt before .caption


def test_folders_are_relative_to_the_working_folder_first(folder: Path, monkeypatch: pytest.MonkeyPatch):
    save(folder / "here/hoge/z.png", txt="z")
    path = write(folder, '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "hoge"\n')
    monkeypatch.chdir(folder / "here")
    assert [each.name for each in read(path).records] == ["hoge/z.png"]


def test_metadata_alone_is_for_the_folder_it_is_in(folder: Path):
    text = f'[[datasets]]\n[[datasets.subsets]]\nmetadata_file = "{folder.as_posix()}/piyo/piyo_md.json"\n'
    assert [each.captions for each in read(write(folder, text)).records] == [("a bird",)]


def test_a_subset_without_repeats_is_not_used(folder: Path):
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "hoge"\nnum_repeats = 0\n'
    with pytest.raises(FileError, match="has no pictures"):
        read(write(folder, text))


SUBSET = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "hoge"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has no table \[\[datasets\]\]"),
        ("[[datasets]]", r"has no table \[\[datasets.subsets\]\]"),
        ("[datasets]\na=1", r"has no table \[\[datasets\]\]"),
        ("[[datasets]]\n[[datasets.subsets]]", "without image_dir"),
        (SUBSET + "shufle_caption = true", r"\[\[datasets.subsets\]\] has the unknown key 'shufle_caption'"),
        (SUBSET + "resolution = 512", "unknown key 'resolution'"),  # of a data set
        ("[[datasets]]\nimage_dir = 'hoge'\n[[datasets.subsets]]", "unknown key 'image_dir'"),
        ("[general]\nx = 1\n" + SUBSET, r"\[general\] has the unknown key 'x'"),
        ("general = 5\n" + SUBSET, r"\[general\] is not a table"),
        ("extra = 5\n" + SUBSET, "unknown key 'extra'"),
        (SUBSET + "keep_tokens = true", "keep_tokens = True; expected a whole number"),
        (SUBSET + "keep_tokens = -1", "expected a whole number from 0"),
        (SUBSET + "num_repeats = 9999999999999", "expected a whole number"),
        (SUBSET + "caption_dropout_rate = 1.5", "expected a number from 0 to 1"),
        (SUBSET + "caption_dropout_rate = nan", "expected a number from 0 to 1"),
        (SUBSET + "flip_aug = 1", "expected true or false"),
        (SUBSET + "flip_aug = 1979-05-27", "a date; expected true or false"),
        (SUBSET + 'class_tokens = "a\\u0000"', "expected text"),
        ("[[datasets]]\nresolution = [1,2,3]\n[[datasets.subsets]]\nimage_dir='hoge'", "expected a number of pixels"),
        ("[[datasets]]\nresolution = 0\n[[datasets.subsets]]\nimage_dir='hoge'", "expected a number of pixels"),
        ("general.shuffle_caption." + "a." * 50 + "b = 1\n" + SUBSET, "a table; expected true or false"),
        ("general.shuffle_caption." + "a." * 50_000 + "b = 1\n" + SUBSET, "nested more than 64 deep|too many dots"),
        ("a = " + "[" * 50_000, "is not TOML|nested"),
        (SUBSET + "image_dir = 'again'", "is not TOML"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = '" + "x" * 5000 + "'", "not a possible file name"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'none'", "none: does not exist"),
        (SUBSET + "metadata_file = 'none.json'", r"none\.json: does not exist"),
    ],
)
def test_bad_files_are_one_line(text: str, message: str, folder: Path):
    with pytest.raises(FileError, match=message) as caught:
        read(write(folder, text))
    assert "\n" not in str(caught.value)

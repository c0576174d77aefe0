"""The data file on well-known models: whole, within its own rules, and consistent with the families."""

from __future__ import annotations

import re

import pytest

from gouache.app.entry import USES
from gouache.app.kinds import FOLDERS
from gouache.app.known import Known, known, named, nearest, of_file
from gouache.families.catalog import family_named

SIZES = {"sd1": 512, "sd2": 768, "sdxl": 1024, "sdxl-refiner": 1024, "svd": 1024}


@pytest.mark.parametrize("name", [
    *(f"v1-{number}" for number in range(1, 6)), "sd-v1-5-inpainting", "2-0", "2-1", "sdxl", "sdxl refiner", "svd",
    "svd_xt", "anything-v3", "realistic vision", "guofeng3", "dreamshaper xl",
])  # fmt: skip
def test_the_models_that_the_field_started_from_are_there(name: str):
    assert named(name) is not None


@pytest.mark.parametrize("each", known(), ids=lambda each: each.name)
def test_every_entry_keeps_the_rules(each: Known):
    assert each.family == "vae" or family_named(each.family).name == each.family
    assert each.use in (*USES, "vae") and (each.use != "vae" or "vae" in FOLDERS)
    assert each.source.startswith("https://") and each.evidence
    assert each.prediction in ("", "eps", "v", "edm-v") and each.clip_skip in (None, 1, 2)
    assert not each.resolution or max(each.resolution) <= 2 * SIZES[each.family]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in (each.sha256 or {}).values())
    assert all(alias == alias.lower() for alias in each.aliases)


def test_no_two_share_a_name_or_an_alias():
    names = ["".join(filter(str.isalnum, form.casefold())) for each in known() for form in {each.name, *each.aliases}]
    per_model = [
        {"".join(filter(str.isalnum, form.casefold())) for form in (each.name, *each.aliases)} for each in known()
    ]

    assert sum(map(len, per_model)) == len(set(names))


def test_a_hash_says_more_than_a_name():
    one = next(each for each in known() if each.sha256)
    ((_, digest), *_) = (one.sha256 or {}).items()
    other = next(each for each in known() if each.files and each is not one and each.files[0] not in one.files)

    assert of_file("renamed.ckpt", digest) is one
    assert of_file(other.files[0], digest) is one and of_file(other.files[0], "") is other
    assert of_file("renamed.ckpt", "") is None


def test_a_file_that_is_only_called_like_a_published_one_is_not_taken_for_it():
    one, name = next((each, name) for each in known() for name in each.files if name in (each.sha256 or {}))

    assert of_file(name, "") == one and of_file(name, "0" * 64) is None


def test_names_like_one_are_offered():
    assert "sdxl" in nearest("sdxxl")

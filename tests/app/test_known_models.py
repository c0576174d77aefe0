"""The data file of well-known models: complete, within its own rules, consistent with the families."""

from __future__ import annotations

import re

import pytest

from gouache.app.categories import FOLDERS
from gouache.app.entry import USES
from gouache.app.known_models import KnownModel, find_by_file, find_by_name, known_models, similar_names
from gouache.families.catalog import family_named

SIZES = {"sd1": 512, "sd2": 768, "sdxl": 1024, "sdxl-refiner": 1024, "svd": 1024}


@pytest.mark.parametrize("name", [
    *(f"v1-{number}" for number in range(1, 6)), "sd-v1-5-inpainting", "2-0", "2-1", "sdxl", "sdxl refiner", "svd",
    "svd_xt", "anything-v3", "realistic vision", "guofeng3", "dreamshaper xl",
])  # fmt: skip
def test_important_models_are_known(name: str):
    assert find_by_name(name) is not None


@pytest.mark.parametrize("each", known_models(), ids=lambda each: each.name)
def test_every_entry_follows_the_rules(each: KnownModel):
    assert each.family == "vae" or family_named(each.family).name == each.family
    assert each.use in (*USES, "vae") and (each.use != "vae" or "vae" in FOLDERS)
    assert each.source.startswith("https://") and each.evidence
    assert each.prediction in ("", "eps", "v", "edm-v") and each.clip_skip in (None, 1, 2)
    assert not each.resolution or max(each.resolution) <= 2 * SIZES[each.family]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in (each.sha256 or {}).values())
    assert all(alias == alias.lower() for alias in each.aliases)


def test_names_and_aliases_are_unique():
    names = [
        "".join(filter(str.isalnum, form.casefold())) for each in known_models() for form in {each.name, *each.aliases}
    ]
    per_model = [
        {"".join(filter(str.isalnum, form.casefold())) for form in (each.name, *each.aliases)}
        for each in known_models()
    ]

    assert sum(map(len, per_model)) == len(set(names))


def test_a_hash_takes_precedence_over_a_file_name():
    one = next(each for each in known_models() if each.sha256)
    ((_, digest), *_) = (one.sha256 or {}).items()
    other = next(each for each in known_models() if each.files and each is not one and each.files[0] not in one.files)

    assert find_by_file("renamed.ckpt", digest) is one
    assert find_by_file(other.files[0], digest) is one and find_by_file(other.files[0], "") is other
    assert find_by_file("renamed.ckpt", "") is None


def test_a_file_with_a_published_name_and_another_hash_is_not_recognised():
    one, name = next((each, name) for each in known_models() for name in each.files if name in (each.sha256 or {}))

    assert find_by_file(name, "") == one and find_by_file(name, "0" * 64) is None


def test_similar_names_are_found():
    assert "sdxl" in similar_names("sdxxl")

"""Names find their models, and hashes are remembered only as long as the file is the same."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gouache.app import library
from gouache.app.settings import Settings
from gouache.errors import RequestError
from gouache.files.open import open_model


@pytest.fixture
def shelf(tmp_path: Path, settings: Settings) -> Settings:
    """Two model folders, with a nested one, a diffusers folder, and things that are no models."""
    for name in (
        "a/dream.safetensors",
        "a/old/dream.ckpt",
        "a/notes.txt",
        "b/dream.safetensors",
        "b/sub/Photo v2.ckpt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "b" / "folder").mkdir()
    (tmp_path / "b" / "folder" / "model_index.json").write_text("{}")
    (tmp_path / "b" / "folder" / "part.safetensors").write_bytes(b"x")
    return replace(settings, models=(tmp_path / "a", tmp_path / "b", tmp_path / "absent"), cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("dream", "a/dream.safetensors"),
        ("dream.safetensors", "a/dream.safetensors"),
        ("dream.ckpt", "a/old/dream.ckpt"),
        ("old/dream", "a/old/dream.ckpt"),
        ("Photo v2", "b/sub/Photo v2.ckpt"),
        ("sub/Photo v2.ckpt", "b/sub/Photo v2.ckpt"),
        ("folder", "b/folder"),
    ],
)
def test_a_name_finds_its_model_in_the_first_folder_that_has_it(name: str, found: str, shelf: Settings, tmp_path: Path):
    assert library.resolve(name, shelf) == tmp_path / found


def test_a_path_needs_no_folder(shelf: Settings, tmp_path: Path):
    assert library.resolve(str(tmp_path / "a" / "notes.txt"), shelf) == tmp_path / "a" / "notes.txt"


def test_the_parts_of_a_diffusers_folder_are_no_models(shelf: Settings, tmp_path: Path):
    names = [path.relative_to(tmp_path / "b").as_posix() for path in library.models(tmp_path / "b")]

    assert names == ["dream.safetensors", "folder", "sub/Photo v2.ckpt"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("draem", "the nearest are dream"),
        ("photo v2", "Photo v2"),
        ("minni", "mini"),
        ("zzz", "looked in"),
        ("x" * 5000, "looked in"),
        ("~nobody-of-that-name/model", "there is no file"),
        ("model\0.ckpt", "there is no file"),
    ],
)
def test_a_name_that_nothing_has_is_refused_with_the_nearest(name: str, hint: str, shelf: Settings):
    with pytest.raises(RequestError) as caught:
        library.resolve(name, shelf)

    assert caught.value.setting == "model"
    assert hint in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_folder_that_leads_back_to_itself_is_searched_once(shelf: Settings, tmp_path: Path):
    for name in ("loop", "again"):
        (tmp_path / "a" / name).symlink_to(tmp_path / "a", target_is_directory=True)

    assert len(list(library.models(tmp_path / "a"))) == 2


def test_the_embedded_model_goes_by_its_name(shelf: Settings):
    if (path := library.embedded("mini")) is None:
        pytest.skip("this build has no embedded model")

    assert library.resolve("mini", shelf) == path


def test_a_hash_is_that_of_the_bytes_and_is_computed_anew_for_other_bytes(shelf: Settings, tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    for value in (1.0, 2.0):
        save_file({"a": torch.full((4,), value)}, path)
        os.utime(path, ns=(0, int(value)))  # two files of one size within one tick of a coarse clock

        for _ in range(2):
            assert library.sha256(open_model(path), shelf) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_remembered_hash_is_not_computed_again(shelf: Settings, tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    library.sha256(open_model(path), shelf)
    store = shelf.cache / "hashes.json"
    store.write_text(json.dumps(dict.fromkeys(json.loads(store.read_text()), "remembered")))

    assert library.sha256(open_model(path), shelf) == "remembered"


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff"])
def test_a_damaged_cache_costs_only_time(content: str, shelf: Settings, tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    shelf.cache.mkdir()
    (shelf.cache / "hashes.json").write_text(content, encoding="latin-1")

    assert library.sha256(open_model(path), shelf) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_cache_that_cannot_be_written_costs_only_time(shelf: Settings, tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    shelf.cache.write_text("a file where the folder should be")

    assert library.sha256(open_model(path), shelf) == hashlib.sha256(path.read_bytes()).hexdigest()

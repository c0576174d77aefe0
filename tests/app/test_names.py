"""Names find their models, as in A1111."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from gouache.app import names, places
from gouache.app.library import Library
from gouache.app.settings import Settings
from gouache.errors import RequestError


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
    folders = (tmp_path / "a", tmp_path / "b", tmp_path / "absent")
    return replace(settings, models=folders, cache=tmp_path / "cache", data=tmp_path / "data")


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
        ("photo V2", "b/sub/Photo v2.ckpt"),  # where no name is the same to the letter
        ("sub\\Photo v2", "b/sub/Photo v2.ckpt"),
    ],
)
def test_a_name_finds_its_model_in_the_first_folder_that_has_it(name: str, found: str, shelf: Settings, tmp_path: Path):
    assert names.resolve(name, shelf) == tmp_path / found


def test_a_path_needs_no_folder(shelf: Settings, tmp_path: Path):
    assert names.resolve(str(tmp_path / "a" / "notes.txt"), shelf) == tmp_path / "a" / "notes.txt"


def test_the_parts_of_a_diffusers_folder_are_no_models(shelf: Settings, tmp_path: Path):
    names = [path.relative_to(tmp_path / "b").as_posix() for path in places.models(tmp_path / "b")]

    assert names == ["dream.safetensors", "folder", "sub/Photo v2.ckpt"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("draem", "the nearest are dream"),
        ("photo v3", "Photo v2"),
        ("minni", "mini"),
        ("zzz", "looked in"),
        ("x" * 5000, "looked in"),
        ("~nobody-of-that-name/model", "there is no file"),
        ("model\0.ckpt", "there is no file"),
    ],
)
def test_a_name_that_nothing_has_is_refused_with_the_nearest(name: str, hint: str, shelf: Settings):
    with pytest.raises(RequestError) as caught:
        names.resolve(name, shelf)

    assert caught.value.setting == "model"
    assert hint in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_folder_that_leads_back_to_itself_is_searched_once(shelf: Settings, tmp_path: Path):
    for name in ("loop", "again"):
        (tmp_path / "a" / name).symlink_to(tmp_path / "a", target_is_directory=True)

    assert len(list(places.models(tmp_path / "a"))) == 2


def test_the_embedded_model_goes_by_its_name(shelf: Settings):
    if (path := names.embedded("mini")) is None:
        pytest.skip("this build has no embedded model")

    assert names.resolve("mini", shelf) == path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_hash_chooses_among_files_of_one_name(shelf: Settings, tmp_path: Path):
    second = tmp_path / "b" / "dream.safetensors"
    second.write_bytes(b"another")

    assert names.resolve(f"dream [{sha256(second)[:10]}]", shelf) == second
    assert names.resolve(f"dream.safetensors [{sha256(second)}]", shelf) == second
    # A1111's first hash, which old pictures name: eight digits, of a part of the file that a short one lacks.
    assert names.resolve(f"dream [{hashlib.sha256(b'').hexdigest()[:8]}]", shelf) == tmp_path / "a/dream.safetensors"


def test_a_renamed_file_is_found_by_its_hash(shelf: Settings, tmp_path: Path):
    path = tmp_path / "a" / "dream.safetensors"
    path.write_bytes(b"of its own")
    with Library.of(shelf) as library:
        library.refresh()
        while library.hash_next() is not None:
            pass
        assert library.entries()  # no file here can be opened, and their names are known all the same
        library.note_hash(path, sha256(path))

    assert names.resolve(f"gone [{sha256(path)[:10]}]", shelf) == path


def test_a_hash_that_nothing_has_is_refused_with_those_there(shelf: Settings):
    with pytest.raises(
        RequestError, match=r"no model 'dream' has the hash 0123456789; there are dream \[[0-9a-f]{10}\]"
    ):
        names.resolve("dream [0123456789]", shelf)


def test_a_place_for_the_kind_asked_for_comes_first(settings: Settings, tmp_path: Path):
    for folder in ("Stable-diffusion", "Lora"):
        (tmp_path / "models" / folder).mkdir(parents=True)
        (tmp_path / "models" / folder / "dream.safetensors").write_bytes(b"x")
    both = replace(settings, models=(tmp_path,))

    assert names.resolve("dream", both, "lora").parent.name == "Lora"
    assert names.resolve("dream", both, "checkpoint").parent.name == "Stable-diffusion"

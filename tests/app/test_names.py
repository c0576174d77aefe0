"""Models are found by name, as in A1111."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from gouache.app import names, search_paths
from gouache.app.library import Library
from gouache.app.settings import Settings
from gouache.errors import RequestError


@pytest.fixture
def two_folders(tmp_path: Path, settings: Settings) -> Settings:
    """Two folders with models, a subfolder, a diffusers folder, and other files; and one that does not exist."""
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
        ("photo V2", "b/sub/Photo v2.ckpt"),  # if there is no exact match
        ("sub\\Photo v2", "b/sub/Photo v2.ckpt"),
    ],
)
def test_a_name_is_found_in_the_first_folder_that_has_it(name: str, found: str, two_folders: Settings, tmp_path: Path):
    assert names.resolve(name, two_folders) == tmp_path / found


def test_a_path_is_used_as_it_is(two_folders: Settings, tmp_path: Path):
    assert names.resolve(str(tmp_path / "a" / "notes.txt"), two_folders) == tmp_path / "a" / "notes.txt"


def test_the_files_in_a_diffusers_folder_are_not_models(two_folders: Settings, tmp_path: Path):
    names = [path.relative_to(tmp_path / "b").as_posix() for path in search_paths.model_files(tmp_path / "b")]

    assert names == ["dream.safetensors", "folder", "sub/Photo v2.ckpt"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("draem", "similar names: dream"),
        ("photo v3", "Photo v2"),
        ("minni", "mini"),
        ("zzz", "searched"),
        ("x" * 5000, "searched"),
        ("~nobody-of-that-name/model", "there is no file"),
        ("model\0.ckpt", "there is no file"),
    ],
)
def test_an_unknown_name_is_refused_with_similar_names(name: str, hint: str, two_folders: Settings):
    with pytest.raises(RequestError) as caught:
        names.resolve(name, two_folders)

    assert caught.value.setting == "model"
    assert hint in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_links_back_to_a_parent_folder_are_not_followed(two_folders: Settings, tmp_path: Path):
    for name in ("loop", "again"):
        (tmp_path / "a" / name).symlink_to(tmp_path / "a", target_is_directory=True)

    assert len(list(search_paths.model_files(tmp_path / "a"))) == 2


def test_the_embedded_model_is_found_by_name(two_folders: Settings):
    if (path := names.embedded("mini")) is None:
        pytest.skip("this build has no embedded model")

    assert names.resolve("mini", two_folders) == path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_hash_selects_among_files_with_the_same_name(two_folders: Settings, tmp_path: Path):
    second = tmp_path / "b" / "dream.safetensors"
    second.write_bytes(b"another")

    assert names.resolve(f"dream [{sha256(second)[:10]}]", two_folders) == second
    assert names.resolve(f"dream.safetensors [{sha256(second)}]", two_folders) == second
    # A1111's first hash, in old pictures: eight digits, of a part of the file that a short file does not have.
    assert (
        names.resolve(f"dream [{hashlib.sha256(b'').hexdigest()[:8]}]", two_folders) == tmp_path / "a/dream.safetensors"
    )


def test_a_renamed_file_is_found_by_its_hash(two_folders: Settings, tmp_path: Path):
    path = tmp_path / "a" / "dream.safetensors"
    path.write_bytes(b"unique")
    with Library.of(two_folders) as library:
        library.refresh()
        while library.hash_next() is not None:
            pass
        assert library.entries()  # although none of these files can be opened
        library.store_hash(path, sha256(path))

    assert names.resolve(f"gone [{sha256(path)[:10]}]", two_folders) == path


def test_an_unknown_hash_is_refused_with_existing_ones(two_folders: Settings):
    with pytest.raises(
        RequestError, match=r"no model 'dream' has the hash 0123456789; there is dream \[[0-9a-f]{10}\]"
    ):
        names.resolve("dream [0123456789]", two_folders)


def test_a_folder_for_the_requested_kind_comes_first(settings: Settings, tmp_path: Path):
    for folder in ("Stable-diffusion", "Lora"):
        (tmp_path / "models" / folder).mkdir(parents=True)
        (tmp_path / "models" / folder / "dream.safetensors").write_bytes(b"x")
    both = replace(settings, models=(tmp_path,))

    assert names.resolve("dream", both, "lora").parent.name == "Lora"
    assert names.resolve("dream", both, "checkpoint").parent.name == "Stable-diffusion"

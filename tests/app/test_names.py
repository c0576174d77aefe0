"""Models are found by name, as in A1111."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gouache.app import names, search_paths
from gouache.app.library import Library
from gouache.app.settings import Settings
from gouache.errors import RequestError
from tests.app.model_files import lora


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
        (" dream ", "a/dream.safetensors"),
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


@pytest.fixture
def webui(settings: Settings, tmp_path: Path) -> Settings:
    """An installation with LoRAs; nothing was listed yet."""
    folder = tmp_path / "webui/models/Lora"
    lora(folder / "hats.safetensors", 1.0)
    lora(folder / "sub/scarf.safetensors", 2.0)
    return replace(settings, models=(tmp_path / "webui",), cache=tmp_path / "cache", data=tmp_path / "data")


@pytest.mark.parametrize("name", ["hats", "hats.safetensors", "Lora/hats", "Lora/hats.safetensors", "lora/HATS"])
def test_the_names_that_the_guide_promises(name: str, webui: Settings, tmp_path: Path):
    assert names.resolve(name, webui, "lora") == tmp_path / "webui/models/Lora/hats.safetensors"
    assert names.resolve("Lora/sub/scarf", webui) == names.resolve("sub/scarf", webui)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_something_called_like_a_model_in_the_working_folder_does_not_hide_it(
    make: Callable[[Path], None], webui: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    work = tmp_path / "work"
    (work / "sub").mkdir(parents=True)
    monkeypatch.chdir(work)
    for name in ("mini", "hats", "sub/scarf", "own"):
        make(work / name)

    assert names.resolve("hats", webui, "lora") == tmp_path / "webui/models/Lora/hats.safetensors"
    assert names.resolve("sub/scarf", webui) == tmp_path / "webui/models/Lora/sub/scarf.safetensors"
    assert names.resolve("./hats", webui) == Path("hats")
    assert names.resolve("own", webui) == Path("own")  # no model has that name
    if (path := names.embedded("mini")) is not None:
        assert names.resolve("mini", webui) == path


def test_a_model_file_in_the_working_folder_is_meant_by_its_full_name(
    webui: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    lora(tmp_path / "hats.safetensors", 3.0)
    (tmp_path / "scarf.safetensors").mkdir()

    assert names.resolve("hats.safetensors", webui) == Path("hats.safetensors")
    assert names.resolve("scarf.safetensors", webui).parent.name == "sub"


def test_names_of_the_library_only(webui: Settings, tmp_path: Path):
    path = lora(tmp_path / "outside.safetensors", 4.0)

    for name in (str(path), "../outside.safetensors", "/etc/passwd", "~/.bashrc"):
        with pytest.raises(RequestError, match="there is no lora named") as caught:
            names.resolve(name, webui, "lora", paths=False)
        assert "\n" not in str(caught.value)
    assert names.resolve("hats", webui, "lora", paths=False).name == "hats.safetensors"


@pytest.mark.parametrize("name", ["style [20240131]", "style [20240131].safetensors", "STYLE [20240131]"])
def test_a_name_that_ends_like_a_hash_is_a_name(name: str, webui: Settings, tmp_path: Path):
    path = lora(tmp_path / "webui/models/Lora/style [20240131].safetensors", 5.0)

    assert names.resolve(name, webui, "lora") == path
    assert names.resolve(f"style [20240131] [{sha256(path)[:10]}]", webui, "lora") == path


@pytest.mark.parametrize("typed", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_composed_and_decomposed_names_are_the_same(typed: str, stored: str, webui: Settings, tmp_path: Path):
    folder = tmp_path / "webui/models/Lora"
    path = lora(folder / (unicodedata.normalize(stored, "Übermäßig é") + ".safetensors"), 5.0)

    assert names.resolve(unicodedata.normalize(typed, "Übermäßig é"), webui, "lora") == path
    assert names.resolve(unicodedata.normalize(typed, "übermässig É"), webui, "lora") == path


def autov3(path: Path) -> str:
    """SHA-256 of what follows the header of a safetensors file; A1111 writes 12 digits of it into pictures."""
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


@pytest.mark.parametrize("digits", [10, 12])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_lora_is_found_by_the_hash_that_pictures_carry(
    digits: int, listed: bool, renamed: bool, webui: Settings, tmp_path: Path
):
    """Also if it was renamed before it was ever listed, and so was never hashed."""
    path = tmp_path / "webui/models/Lora/hats.safetensors"
    for digest in (autov3(path)[:digits], sha256(path)[:digits], sha256(path)):
        if listed:
            with Library.of(webui) as library:
                library.refresh()
                while library.hash_next() is not None:
                    pass
        if renamed:
            path = path.rename(path.with_name(f"new-{path.name}"))

        assert names.resolve(f"hats [{digest}]", webui, "lora") == path


def test_a_checkpoint_is_found_by_its_first_hash_after_it_was_renamed(webui: Settings, tmp_path: Path):
    path = tmp_path / "webui/models/Stable-diffusion/new.safetensors"
    path.parent.mkdir()
    save_file({"weight": torch.rand(300_000)}, path)
    data = path.read_bytes()
    first = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]

    assert names.resolve(f"old [{first}]", webui) == path


def test_the_library_s_hash_of_a_file_that_was_replaced_is_not_believed(webui: Settings, tmp_path: Path):
    path = tmp_path / "webui/models/Lora/hats.safetensors"
    digest, times = sha256(path), path.stat()
    with Library.of(webui) as library:
        library.refresh()
        while library.hash_next() is not None:
            pass
    lora(path, 9.0)  # of the same size
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    with pytest.raises(RequestError, match=f"has the hash {digest}"):
        names.resolve(f"gone [{digest}]", webui, "lora")

"""`gouache models`: output, JSON and exit code of each command."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from gouache.app import indexing
from tests.app.model_files import embedding, lora
from tests.cli.conftest import Command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the library with two models."""
    monkeypatch.setenv("GOUACHE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("GOUACHE_MODELS", str(tmp_path / "folder"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lora(tmp_path / "folder/Lora/style.safetensors", 1.0)
    embedding(tmp_path / "folder/embeddings/bad.safetensors")
    return tmp_path / "folder"


def test_list_prints_lines_and_json(gouache: Command, folder: Path):
    every = gouache("models", "list")
    some = json.loads(gouache("models", "list", "--kind", "lora", "--json").out)

    assert every.code == 0 and [line.split()[:3] for line in every.out.splitlines()] == [
        ["bad", "embedding", "sd1"], ["style", "lora", "sd1"],
    ]  # fmt: skip
    assert "hashing" not in every.err  # a list starts no work
    assert [(each["names"][0], each["kind"], each["path"]) for each in some] == [
        ("style", "lora", str(folder / "Lora/style.safetensors"))
    ]


def test_a_long_list_has_column_names_dates_and_paths(gouache: Command, folder: Path):
    head, first, second = gouache("models", "list", "--long").out.splitlines()

    assert head.split() == ["name", "kind", "family", "size", "AutoV2", "added", "path,", "tags"]
    for line, path in ((first, "embeddings/bad.safetensors"), (second, "Lora/style.safetensors")):
        assert line.split()[-2:] == [f"{datetime.now():%Y-%m-%d}", str(folder / path)]
        assert line.index(f"{datetime.now():%Y}") == head.index("added")


def test_values_that_are_set_are_shown_found_and_kept_when_the_file_is_renamed(gouache: Command, folder: Path):
    changed = gouache(
        "models", "set", "style", "--tag", "hat", "--weight", "0.7", "--use", "anime", "--trigger", "blue hat"
    )
    (folder / "Lora/style.safetensors").rename(folder / "Lora/new.safetensors")
    found = gouache("models", "find", "blue", "HAT")
    shown = json.loads(gouache("models", "show", "new", "--json").out)
    gouache("models", "set", "new", "--untag", "hat")
    none = gouache("models", "find", "hat", "anime", "scarf")

    assert changed.code == 0 and "weight         0.7" in changed.out
    assert found.out.split()[0] == "new" and "was moved to" in found.err
    assert (shown["tags"], shown["use"], shown["weight"]) == (["hat"], "anime", 0.7)
    assert (none.code, none.out) == (1, "")


def test_a_well_known_model_is_shown_although_it_is_not_installed(gouache: Command, folder: Path):
    page, data = gouache("models", "show", "SDXL"), gouache("models", "show", "sd-1.5", "--json")

    assert page.code == 0 and "1024x1024" in page.out and "https://huggingface.co/stabilityai" in page.out
    assert json.loads(data.out)["known"]["licence"] == "CreativeML OpenRAIL-M"


def test_an_unknown_name_is_an_error_of_one_line(gouache: Command, folder: Path):
    near, far, nothing = (gouache("models", *each) for each in (("show", "sdxxl"), ("show", "%%%"), ("set", "style")))

    assert near.code == far.code == nothing.code == 2
    assert "sdxl" in near.err and "--tag" in nothing.err
    assert all(each.err.startswith("error: ") and each.err.count("\n") == 1 for each in (near, far, nothing))


def test_add_and_remove_a_folder(gouache: Command, folder: Path, tmp_path: Path):
    lora(tmp_path / "more/third.safetensors", 3.0)

    gouache("models", "list")
    added = gouache("models", "add", tmp_path / "more")
    again = gouache("models", "add", tmp_path / "more", "--json")
    there = gouache("models", "list").out
    removed = gouache("models", "remove", tmp_path / "more")

    assert "1 new model in the library" in added.out and json.loads(again.out) == {"added": 0, "new": []}
    assert "third" in there and "third" not in gouache("models", "list").out
    assert "removed from the library" in removed.out and (tmp_path / "more/third.safetensors").exists()


def test_a_file_is_deleted_only_with_delete(gouache: Command, folder: Path):
    (folder / "Lora/style.json").write_text('{"notes": "mine"}')

    refused = gouache("models", "remove", "style")
    done = json.loads(gouache("models", "remove", "style", "--delete", "--json").out)

    assert refused.code == 2 and "--delete" in refused.err
    assert [Path(each).name for each in done["deleted"]] == ["style.safetensors", "style.json"]
    assert list((folder / "Lora").iterdir()) == []


def test_what_is_not_in_the_library_is_never_deleted(gouache: Command, folder: Path, tmp_path: Path):
    other = lora(tmp_path / "other/style.safetensors", 2.0)

    for path in (other, other.parent):
        refused = gouache("models", "remove", path, "--delete")
        assert refused.code == 2 and "is not in the library" in refused.err and other.exists()


def test_a_model_file_that_was_added_is_taken_off_the_list_by_its_name(gouache: Command, folder: Path, tmp_path: Path):
    path = lora(tmp_path / "single.safetensors", 5.0)
    gouache("models", "add", path)

    removed = gouache("models", "remove", "single")

    assert removed.code == 0 and "no file was deleted" in removed.out
    assert path.exists() and "single" not in gouache("models", "list").out


def test_the_folder_to_remove_is_named(gouache: Command, folder: Path, tmp_path: Path):
    path = lora(tmp_path / "more/single.safetensors", 5.0)
    gouache("models", "add", path.parent)

    refused = gouache("models", "remove", "single")

    assert refused.code == 2 and f"`gouache models remove {path.parent}`" in refused.err
    assert "--delete" not in refused.err and path.exists()


def test_sidecar_files_that_stayed_elsewhere_are_not_deleted(gouache: Command, folder: Path):
    path = folder / "Lora/style.safetensors"
    path.with_suffix(".json").write_text('{"notes": "mine"}')
    gouache("models", "set", "style", "--tag", "hat")
    path.rename(folder / "Lora/new.safetensors")
    found = gouache("models", "find", "mine")
    done = json.loads(gouache("models", "remove", "new", "--delete", "--json").out)

    assert found.out.split()[0] == "new"
    assert [Path(each).name for each in done["deleted"]] == ["new.safetensors"] and path.with_suffix(".json").exists()


def test_verify_prints_a_line_per_model(gouache: Command, folder: Path, tmp_path: Path):
    good = gouache("models", "verify")
    (folder / "embeddings/bad.safetensors").write_bytes(b"cut")
    bad = gouache("models", "verify")

    assert good.code == 0 and good.out.splitlines()[-1] == "2 models, 0 bad"
    assert bad.code == 1 and bad.out.splitlines()[-1] == "2 models, 1 bad"
    assert [json.loads(line)["good"] for line in gouache("models", "verify", "--json").out.splitlines()] == [
        False,
        True,
    ]


def test_install_prints_path_and_name(gouache: Command, folder: Path, tmp_path: Path):
    done = gouache("models", "install", lora(tmp_path / "new.safetensors", 4.0))
    again = json.loads(gouache("models", "install", tmp_path / "new.safetensors", "--json").out)

    assert "its name is 'new'" in done.out and again["already"]
    assert Path(again["path"]) == tmp_path / "data/models/Lora/new.safetensors"
    assert "new" in gouache("models", "list").out
    assert json.loads(gouache("models", "show", "new", "--json").out)["source"] == str(tmp_path / "new.safetensors")


def test_only_adding_starts_the_background_process(
    gouache: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    started = list[bool]()

    def start(starts: bool) -> bool:
        started.append(starts)
        return starts

    monkeypatch.setattr(indexing, "start", lambda: start(True))
    for command in (["list"], ["find", "style"], ["show", "style"]):
        gouache("models", *command)
    assert started == []
    lora(tmp_path / "more/a.safetensors", 7.0)
    noted = gouache("models", "add", tmp_path / "more")
    monkeypatch.setattr(indexing, "start", lambda: start(False))  # GOUACHE_INDEX=0
    silent = gouache("models", "add", tmp_path / "more")

    assert started == [True, False]
    assert "in the background" in noted.err and "in the background" not in silent.err

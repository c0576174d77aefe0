"""Sidecar files of other programs are read in their own formats, and any content is harmless."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gouache.app.sidecars import Sidecar, read

CIVITAI = {
    "id": 7, "modelId": 42, "name": "v2", "trainedWords": ["blue hat", "smile"], "baseModel": "SD 1.5",
    "description": "<p>Paints <b>hats</b>.</p><p>Use 0.8</p>",
    "model": {"name": "Hats", "tags": ["clothing"], "nsfw": False},
    "files": [{"name": "hats.safetensors", "hashes": {"SHA256": "AB" * 32, "AutoV2": "X"}}],
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "hats.v1.safetensors"  # a dot in the name, as in version numbers
    path.write_bytes(b"x")
    return path


def write(model: Path, suffix: str, value: object) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    model.with_name("hats.v1" + suffix).write_text(text, encoding="utf-8")


def test_the_file_of_civitai_helper(model: Path):
    write(model, ".civitai.info", CIVITAI)

    assert read(model) == Sidecar(
        title="Hats v2", description="Paints hats.\nUse 0.8", base="SD 1.5", trigger_words=("blue hat", "smile"),
        tags=("clothing",), source="https://civitai.com/models/42", sha256="ab" * 32, files=("hats.v1.civitai.info",),
    )  # fmt: skip


def test_values_of_a1111_take_precedence(model: Path):
    write(model, ".civitai.info", CIVITAI)
    write(
        model, ".json",
        {"description": "mine", "sd version": "SDXL", "activation text": "hat, big hat", "preferred weight": 0.7,
         "negative text": "bare", "notes": "good"},
    )  # fmt: skip

    found = read(model)

    assert (found.description, found.base, found.trigger_words) == ("mine", "SDXL", ("hat", "big hat"))
    assert (found.weight, found.negative, found.notes) == (0.7, "bare", "good")
    assert found.title == "Hats v2"  # A1111 has no such field


def test_default_values_of_a1111_are_ignored(model: Path):
    write(
        model, ".json",
        {"description": "", "sd version": "Unknown", "activation text": "", "preferred weight": 0, "notes": ""},
    )  # fmt: skip

    assert read(model) == Sidecar()


def test_the_file_of_the_lora_manager(model: Path):
    write(
        model, ".metadata.json",
        {"model_name": "Hats!", "base_model": "Pony", "tags": ["a"], "sha256": "CD" * 32, "civitai": CIVITAI},
    )  # fmt: skip

    found = read(model)

    assert (found.title, found.base, found.sha256) == ("Hats!", "Pony", "cd" * 32)
    assert found.trigger_words == ("blue hat", "smile")


def test_previews_and_configurations_are_found(model: Path):
    for name in ("hats.v1.png", "hats.v1.preview.jpg", "hats.v1.yaml", "hats.png"):
        model.with_name(name).write_bytes(b"x")

    found = read(model)

    assert Path(found.preview).name == "hats.v1.preview.jpg" and Path(found.config).name == "hats.v1.yaml"


def test_an_embedding_in_a_picture_is_not_its_own_preview(tmp_path: Path):
    path = tmp_path / "style.png"
    path.write_bytes(b"x")

    assert read(path).preview == ""


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", '{"trainedWords": 3, "model": [], "files": {"a": 1}, "name": null}', "[" * 100_000, "\x00"],
)
@pytest.mark.parametrize("suffix", [".json", ".civitai.info", ".metadata.json"])
def test_unexpected_content_is_ignored(model: Path, suffix: str, text: str):
    write(model, suffix, text)

    assert read(model) == Sidecar()


def test_control_characters_are_escaped(model: Path):
    write(model, ".json", {"notes": "a\x1b[2Jb\nc"})

    assert read(model).notes == "a\\x1b[2Jb\nc"

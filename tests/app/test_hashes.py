"""Hashes are remembered only as long as the file is the same."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gouache.app import hashes
from gouache.app.settings import Settings
from gouache.files.open import open_model


@pytest.fixture
def shelf(tmp_path: Path, settings: Settings) -> Settings:
    return replace(settings, cache=tmp_path / "cache")


def test_a_hash_is_that_of_the_bytes_and_is_computed_anew_for_other_bytes(shelf: Settings, tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    for value in (1.0, 2.0):
        save_file({"a": torch.full((4,), value)}, path)
        os.utime(path, ns=(0, int(value)))  # two files of one size within one tick of a coarse clock

        for _ in range(2):
            assert hashes.sha256(open_model(path), shelf) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_remembered_hash_is_not_computed_again(shelf: Settings, tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    hashes.sha256(open_model(path), shelf)
    store = shelf.cache / "hashes.json"
    store.write_text(json.dumps(dict.fromkeys(json.loads(store.read_text()), "remembered")))

    assert hashes.sha256(open_model(path), shelf) == "remembered"


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff"])
def test_a_damaged_cache_costs_only_time(content: str, shelf: Settings, tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    shelf.cache.mkdir()
    (shelf.cache / "hashes.json").write_text(content, encoding="latin-1")

    assert hashes.sha256(open_model(path), shelf) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_cache_that_cannot_be_written_costs_only_time(shelf: Settings, tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    shelf.cache.write_text("a file where the folder should be")

    assert hashes.sha256(open_model(path), shelf) == hashlib.sha256(path.read_bytes()).hexdigest()

"""Cached hashes are used only while the file is unchanged."""

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
def cached(tmp_path: Path, settings: Settings) -> Settings:
    return replace(settings, cache=tmp_path / "cache")


def test_a_changed_file_is_hashed_again(cached: Settings, tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    for value in (1.0, 2.0):
        save_file({"a": torch.full((4,), value)}, path)
        os.utime(path, ns=(0, int(value)))  # the same size, and times that differ by one nanosecond

        for _ in range(2):
            assert hashes.sha256(open_model(path), cached) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_cached_hash_is_not_computed_again(cached: Settings, tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    hashes.sha256(open_model(path), cached)
    store = cached.cache / "hashes.json"
    store.write_text(json.dumps(dict.fromkeys(json.loads(store.read_text()), "cached")))

    assert hashes.sha256(open_model(path), cached) == "cached"


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff"])
def test_a_damaged_cache_is_ignored(content: str, cached: Settings, tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    cached.cache.mkdir()
    (cached.cache / "hashes.json").write_text(content, encoding="latin-1")

    assert hashes.sha256(open_model(path), cached) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_cache_that_cannot_be_written_is_no_error(cached: Settings, tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    cached.cache.write_text("a file where the folder should be")

    assert hashes.sha256(open_model(path), cached) == hashlib.sha256(path.read_bytes()).hexdigest()

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
from gouache.errors import FileError
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
    store.write_text(json.dumps(dict.fromkeys(json.loads(store.read_text()), "c" * 64)))

    assert hashes.sha256(open_model(path), cached) == "c" * 64


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff", "[" * 100_000, '{"a": ' + "1" * 5000 + "}"])
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


def test_a_file_that_was_replaced_by_one_of_the_same_size_and_time_is_hashed_again(cached: Settings, tmp_path: Path):
    path, other = tmp_path / "weights.safetensors", tmp_path / "other.safetensors"
    for each, value in ((path, 1.0), (other, 2.0)):
        save_file({"a": torch.full((4,), value)}, each)
        os.utime(each, ns=(5, 5))
    before = hashes.sha256(open_model(path), cached), hashes.hashes(path, cached)

    other.replace(path)
    replaced = hashes.sha256(open_model(path), cached), hashes.hashes(path, cached)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(5, 5))

    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert before[0] == before[1].sha256 != replaced[0] == replaced[1].sha256
    assert hashes.sha256(open_model(path), cached) == hashes.hashes(path, cached).sha256 == expected


@pytest.mark.parametrize(
    "value", ["\x1b[31mred", 5, None, [1], "F" * 64, {"sha256": "\x1b[31mred"}, {"sha256": 5, "autov1": []}]
)
def test_a_forged_cache_is_ignored(value: object, cached: Settings, tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    expected = hashes.hashes(path, cached)
    store = cached.cache / "hashes.json"
    store.write_text(json.dumps(dict.fromkeys(json.loads(store.read_text()), value)))

    assert hashes.sha256(open_model(path), cached) == expected.sha256 and hashes.hashes(path, cached) == expected


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on this system")
def test_a_named_pipe_or_a_device_as_cache_or_file_does_not_block(cached: Settings, tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    cached.cache.mkdir()
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "endless.ckpt").symlink_to("/dev/zero")
    (tmp_path / "loop.ckpt").symlink_to("loop.ckpt")

    (cached.cache / "hashes.json").symlink_to("/dev/zero")
    assert hashes.sha256(open_model(path), cached) == hashlib.sha256(path.read_bytes()).hexdigest()
    for name in ("pipe.ckpt", "endless.ckpt", "loop.ckpt", "absent.ckpt"):
        for function in (hashes.sha256_of, hashes.hashes):
            with pytest.raises(FileError):
                function(tmp_path / name, cached)
        with pytest.raises(FileError):
            hashes.read_now(tmp_path / name)

"""The hash of a model file is computed beside the first steps, with progress, once."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import gouache
from gouache.app import hashes, hashing
from gouache.app.hashing import BackgroundHash
from gouache.app.settings import Settings
from gouache.errors import FileError
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from tests.pipelines import Narrow


@pytest.fixture
def own(tmp_path: Path) -> Settings:
    return Settings((tmp_path,), tmp_path / "out", None, None, tmp_path / "cache", tmp_path / "data")


def test_the_steps_do_not_wait_for_the_hash_and_the_recipe_has_it(
    narrow: Callable[[str], Narrow], own: Settings, monkeypatch: pytest.MonkeyPatch
):
    path = narrow("sd1").file
    stepped = threading.Event()
    real = hashes.sha256

    def slow(file: ModelFile, settings: Settings, on_bytes: Any = None) -> str:
        assert stepped.wait(60), "no step was made while the hash was not there"
        return real(file, settings, on_bytes)

    monkeypatch.setattr(hashes, "sha256", slow)
    monkeypatch.setattr(hashing, "POLL", 0.01)
    model = gouache.load(path, device="cpu", dtype="fp32", settings=own)

    picture = next(model.paint("a cat", steps=1, size=(64, 64), on_step=lambda step: stepped.set()))

    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert picture.recipe["model"]["sha256"] == expected == model.sha256


def test_progress_is_reported_while_it_is_awaited(narrow: Callable[[str], Narrow], own: Settings, monkeypatch):
    file = open_model(narrow("sd1").file)
    reported: list[tuple[str, int, int]] = []
    seen = threading.Event()

    def slow(file: ModelFile, settings: Settings, on_bytes: Any) -> str:
        on_bytes(1000)
        assert seen.wait(60)
        return "0123"

    def on_work(what: str, done: int, total: int) -> None:
        reported.append((what, done, total))
        seen.set()

    monkeypatch.setattr(hashes, "sha256", slow)
    monkeypatch.setattr(hashing, "POLL", 0.01)

    assert BackgroundHash(file, own).result(on_work) == "0123"
    assert reported[0] == ("hashing the model", 1000, narrow("sd1").file.stat().st_size)


def test_a_file_that_is_gone_is_an_error_of_the_caller(narrow: Callable[[str], Narrow], own: Settings, monkeypatch):
    def fails(file: ModelFile, settings: Settings, on_bytes: Any) -> str:
        raise FileError("gone.safetensors", "cannot be read: No such file or directory")

    monkeypatch.setattr(hashes, "sha256", fails)

    with pytest.raises(FileError, match="gone"):
        BackgroundHash(open_model(narrow("sd1").file), own).result()


def test_a_model_file_that_is_moved_away_costs_no_picture(
    narrow: Callable[[str], Narrow], own: Settings, tmp_path: Path
):
    path = Path(shutil.copy(narrow("sd1").file, tmp_path / "moved.safetensors"))
    model = gouache.load(path, device="cpu", dtype="fp32", settings=own)
    path.rename(tmp_path / "elsewhere.safetensors")

    first = next(model.paint("a cat", steps=1, size=(64, 64)))
    (tmp_path / "elsewhere.safetensors").rename(path)
    second = next(model.paint("a cat", steps=1, size=(64, 64)))

    assert first.recipe["model"]["sha256"] is None
    assert second.recipe["model"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_threads_that_ask_at_once_share_one_computation(
    narrow: Callable[[str], Narrow], own: Settings, monkeypatch: pytest.MonkeyPatch
):
    calls: list[int] = []

    def counted(file: ModelFile, settings: Settings, on_bytes: Any) -> str:
        calls.append(1)
        time.sleep(0.05)
        return "0123"

    monkeypatch.setattr(hashes, "sha256", counted)
    shared = BackgroundHash(open_model(narrow("sd1").file), own)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: shared.result(), range(8)))

    assert results == ["0123"] * 8 and len(calls) == 1

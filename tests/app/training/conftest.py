"""Pictures for runs of narrow models."""

from __future__ import annotations

from pathlib import Path

import pytest

from gouache.training import memory

from .short_runs import make_pictures


@pytest.fixture(autouse=True)
def quick_trim(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Returning freed memory takes long in a process of many tests."""
    if not request.module.__name__.endswith("test_memory"):
        monkeypatch.setattr(memory, "trim", lambda: None)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures of four shapes with captions."""
    return make_pictures(tmp_path / "pictures", ((64, 64), (96, 64), (64, 96), (64, 64), (80, 64)))

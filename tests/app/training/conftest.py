"""Pictures for runs of narrow models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gouache.training import memory


@pytest.fixture(autouse=True)
def quick_trim(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Returning freed memory takes long in a process of many tests."""
    if not request.module.__name__.endswith("test_memory"):
        monkeypatch.setattr(memory, "trim", lambda: None)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures of three shapes with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, size in enumerate(((64, 64), (96, 64), (64, 96), (64, 64), (80, 64))):
        levels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(levels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"zorb, number {number}, red")
    return folder

"""Pictures for runs of narrow models."""

from __future__ import annotations

from pathlib import Path

import pytest

from .short_runs import make_pictures


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures of four shapes with captions."""
    return make_pictures(tmp_path / "pictures", ((64, 64), (96, 64), (64, 96), (64, 64), (80, 64)))

"""Shared by the recipes' tests: the glyphs of the test font."""

from __future__ import annotations

import pytest

from recipes.mini.rendering import Glyphs
from tests.recipes.subset import FONT


@pytest.fixture(scope="session")
def glyphs() -> Glyphs:
    return Glyphs(FONT)

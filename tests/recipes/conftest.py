"""What the recipe's tests share: the font's glyphs, where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # recipes/ stands beside the package, not in it

from gouache.errors import RequestError
from recipes.mini.rendering import Glyphs


@pytest.fixture(scope="session")
def glyphs() -> Glyphs:
    try:
        return Glyphs()
    except RequestError as error:
        pytest.skip(str(error))

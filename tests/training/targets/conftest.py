"""Narrow models for the tests of targets."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gouache import Model
from tests.pipelines import Narrow
from tests.training.targets.steps import loader


@pytest.fixture(scope="session")
def models(narrow: Callable[[str], Narrow]) -> Callable[[str], Model]:
    return loader(narrow)

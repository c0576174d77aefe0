"""Parameters of tests of which some run by default, and all with `-m "full or not full"`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def usual(cases: Iterable[Any], by_default: Collection[Any]) -> list[Any]:
    """`cases` as parameters; those that are not in `by_default` have the marker `full`."""
    return [each if each in by_default else _full(each) for each in cases]


def _full(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full)

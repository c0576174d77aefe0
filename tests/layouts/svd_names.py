"""The pairs of svd_names.txt."""

from __future__ import annotations

from pathlib import Path

LINES = Path(__file__).with_suffix(".txt").read_text().splitlines()
PAIRS: dict[str, str] = dict(line.split() for line in LINES if not line.startswith("#"))
"""{name in the original single file: component/name in a diffusers folder}."""


def pairs(prefix: str, component: str) -> dict[str, str]:
    """The pairs from `prefix` to `component`, without both."""
    return {
        ours.removeprefix(prefix): theirs.removeprefix(f"{component}/")
        for ours, theirs in PAIRS.items()
        if ours.startswith(prefix) and theirs.startswith(f"{component}/")
    }

"""The emoji font of the tests: a small subset of Noto Color Emoji, so that no test needs an installed font."""

from __future__ import annotations

from pathlib import Path

from recipes.mini.names import load_things

FONTS = Path(__file__).parents[1] / "fonts"
FONT = FONTS / "NotoColorEmoji-subset.ttf"  # made by scripts/make_test_font.py
GLYPHS = {line.split("\t")[0] for line in (FONTS / "glyphs.txt").read_text(encoding="utf-8").splitlines()}
THINGS = tuple(thing for thing in load_things() if thing.glyph in GLYPHS)  # the things that it can draw

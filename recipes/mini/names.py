"""What mini's pictures can hold: the named things of `names.toml`, and twelve background colours.

Things are data, so that more are added without touching code; colours are few and chosen far apart, so that a
colour word always means one clearly different picture.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NAMES_FILE = Path(__file__).with_name("names.toml")


@dataclass(frozen=True, slots=True)
class Thing:
    """One glyph with its words. `article` and `colour` are empty where the usual rule, or no colour, holds."""

    glyph: str
    name: str
    also: tuple[str, ...] = ()
    article: str = ""
    colour: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """Every way captions name the thing, the usual one first."""
        return (self.name, *self.also)


@dataclass(frozen=True, slots=True)
class Colour:
    """A background colour: sRGB 0..255, its usual name first, then its synonyms."""

    rgb: tuple[int, int, int]
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.words[0]


COLOURS: tuple[Colour, ...] = (
    Colour((215, 35, 40), ("red",)),
    Colour((248, 140, 25), ("orange",)),
    Colour((252, 222, 55), ("yellow",)),
    Colour((50, 160, 65), ("green",)),
    Colour((40, 90, 215), ("blue",)),
    Colour((125, 50, 170), ("purple", "violet")),
    Colour((252, 150, 195), ("pink",)),
    Colour((115, 70, 35), ("brown",)),
    Colour((18, 18, 20), ("black",)),
    Colour((250, 250, 250), ("white",)),
    Colour((135, 135, 138), ("grey", "gray")),
    Colour((65, 205, 205), ("turquoise", "cyan")),
)


def load_things(path: Path = NAMES_FILE) -> tuple[Thing, ...]:
    """The rows of a names file, in its order."""
    with path.open("rb") as file:
        rows = tomllib.load(file)["things"]
    return tuple(Thing(**{**row, "also": tuple(row.get("also", ()))}) for row in rows)


def nearest_colour(rgb: Sequence[float], colours: Sequence[Colour] = COLOURS) -> Colour:
    """The named colour at the least distance from `rgb` (sRGB, 0..255)."""
    return min(colours, key=lambda colour: sum((a - b) ** 2 for a, b in zip(colour.rgb, rgb)))

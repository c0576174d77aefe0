"""What mini's pictures can contain: the named things of `names.toml`, and twelve colours.

Things are data, so that more can be added without changing code. Colours are few and far apart, so that each colour
word makes a clearly different picture.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NAMES_FILE = Path(__file__).with_name("names.toml")


@dataclass(frozen=True, slots=True)
class Thing:
    """One glyph with its names.

    `article` is empty where "a" or "an" follows from the first letter, `colour` where there is no single usual colour.
    """

    glyph: str
    name: str
    synonyms: tuple[str, ...] = ()
    article: str = ""
    colour: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """All names that captions use for the thing, the most frequent first."""
        return (self.name, *self.synonyms)


@dataclass(frozen=True, slots=True)
class Colour:
    """A colour of backgrounds and tints: sRGB 0..255; its usual name, then its synonyms."""

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
    """The rows of a names file, in file order."""
    with path.open("rb") as file:
        rows = tomllib.load(file)["things"]
    return tuple(Thing(**{**row, "synonyms": tuple(row.get("synonyms", ()))}) for row in rows)


def nearest_colour(rgb: Sequence[float], colours: Sequence[Colour] = COLOURS) -> Colour:
    """The named colour nearest to `rgb` (sRGB, 0..255; Euclidean distance)."""
    return min(colours, key=lambda colour: sum((a - b) ** 2 for a, b in zip(colour.rgb, rgb)))

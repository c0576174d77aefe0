"""Reading captions and prompts: which things a text names."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping

from recipes.mini.captions import SIZE_WORDS
from recipes.mini.names import COLOURS, Thing, load_things

THINGS = load_things()
COLOUR_OF_WORD = {word: colour.name for colour in COLOURS for word in colour.words}
SIZES = {word for words in SIZE_WORDS.values() for word in words}
THING_OF_NAME = {name: thing.name for thing in THINGS for name in thing.words}
LONGEST = max(len(name.split()) for name in THING_OF_NAME)  # words in a name
# A name of one thing that is also a size word and a name of another: "a big wheel" is a ferris wheel or a large wheel.
AMBIGUOUS = {
    name: THING_OF_NAME[rest]
    for name, thing in THING_OF_NAME.items()
    for size, _, rest in [name.partition(" ")]
    if size in SIZES and THING_OF_NAME.get(rest, thing) != thing
}


def find_names(text: str, names: Container[str]) -> list[tuple[int, int]]:
    """(start, end) of every one of `names` in a text, in order.

    Names are read from the right, the longest first: the head of an English noun phrase is its last word, so "a little
    bird nest" names a "bird nest" (a little one) and not a "little bird", although that is longer.
    """
    words = [found.span() for found in re.finditer(r"[\w'-]+", text)]
    spans = []
    last = len(words)
    while last:
        end = words[last - 1][1]
        for first in range(max(0, last - LONGEST), last):
            if text[words[first][0] : end] in names:
                spans.append((words[first][0], end))
                last = first
                break
        else:
            last -= 1
    return spans[::-1]


def replace_names(text: str, replacements: Mapping[str, str]) -> str:
    """The text with every name in it replaced."""
    for start, end in reversed(find_names(text, replacements)):
        text = text[:start] + replacements[text[start:end]] + text[end:]
    return text


def names_in(text: str) -> list[str]:
    """The names of things in a text, in order."""
    return [text[start:end] for start, end in find_names(text, THING_OF_NAME)]


def without_names(text: str) -> str:
    """The text with "#" for every name of a thing."""
    return replace_names(text, dict.fromkeys(THING_OF_NAME, "#"))


def readings(text: str) -> list[Counter[str]]:
    """The things that a text names: one Counter, or several if it has ambiguous names."""
    choices = [[THING_OF_NAME[name], *([AMBIGUOUS[name]] if name in AMBIGUOUS else [])] for name in names_in(text)]
    return [Counter(choice) for choice in itertools.product(*choices)]


def with_letters(text: str, things: Iterable[Thing]) -> str:
    """The text with the names of the first thing replaced by "A", of the second by "B" and so on."""
    letters = {name: letter for letter, thing in zip("ABC", things) for name in thing.words}
    return replace_names(text, letters)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())

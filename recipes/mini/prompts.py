"""The prompts of `prompts.txt` and `prompts_more.txt`, and the pairs among them that differ in one noun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from gouache.errors import FileError, RequestError
from recipes.mini.names import COLOURS, load_things

PROMPTS_FILE = Path(__file__).with_name("prompts.txt")
MORE_PROMPTS_FILE = Path(__file__).with_name("prompts_more.txt")
SIDES = ("", "beside", "over")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, the names of the things it requests, and the name of the background's colour.

    `tint` is the requested colour of the thing, "" for its usual one; `side` is the requested arrangement of two
    things: the first "beside" (left of) or "over" the second, "" for any.
    """

    text: str
    things: tuple[str, ...]
    colour: str
    tint: str = ""
    side: str = ""


def read_prompts(path: Path = PROMPTS_FILE) -> tuple[Prompt, ...]:
    """The prompts of a file, in file order; every thing and colour must be one that the model is trained on."""
    known = {thing.name for thing in load_things()}
    colours = {colour.name for colour in COLOURS}
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FileError(
            path, "is not UTF-8; expected text with a prompt, its things and its colour per line, separated by tabs"
        ) from None
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        parts = line.split("\t")
        if not 3 <= len(parts) <= 5:
            raise RequestError(
                "prompts",
                f"{path} line {number}: has {len(parts)} parts; expected prompt, things, colour [, tint [, side]],"
                " separated by tabs",
            )
        prompt = Prompt(parts[0], tuple(parts[1].split(", ")), *parts[2:])
        if prompt.side not in SIDES:
            raise RequestError("prompts", f"{path} line {number}: side is {prompt.side!r}; expected beside or over")
        for unknown in {*prompt.things} - known | {prompt.colour, prompt.tint} - colours - {""}:
            raise RequestError("prompts", f"{path} line {number}: {unknown!r} is not a thing of names.toml or a colour")
        prompts.append(prompt)
    return tuple(prompts)


def noun_pairs(prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
    """Indices of pairs of prompts that differ in one word only and request different things."""
    pairs = []
    for (i, a), (j, b) in combinations(enumerate(prompts), 2):
        words, others = a.text.split(), b.text.split()
        differing = len(words) == len(others) and sum(x != y for x, y in zip(words, others))
        if differing == 1 and a.things != b.things:
            pairs.append((i, j))
    return pairs

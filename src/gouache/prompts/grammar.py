r"""Emphasis in prompts, as A1111's web UI reads it: text to runs of weighted text.

    (a)       weight 1.1             [a]      weight 1 / 1.1
    (a:1.3)   weight 1.3             BREAK    what follows starts a new chunk of 75 tokens
    \( \) \[ \] \\   the character itself

Nested weights multiply. Every text is a prompt: a bracket that is never closed extends to the end, a closing bracket
without an opening one is text, and so is a malformed weight. Round and square brackets may overlap: `(a [b) c]`.
Schedules, alternation and `AND` are read before this, by `schedule`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gouache.prompts.tags import KINDS

EMPHASIS = 1.1
MAX_WEIGHT = 1e6  # far beyond use; without a limit the text encoder's output overflows


@dataclass(frozen=True)
class Break:
    """The end of a chunk of tokens, also within brackets; weights around it have no effect on it."""


Run = tuple[str, float] | Break
"""Text without escapes and its weight, or the end of a chunk."""

# A backslash before any other character is dropped, and so is one at the end.
_TOKEN = re.compile(
    r"""
      \\ (?P<escaped> [\\()\[\]]? )
    | :\s* (?P<weight> [+-]? (?: \d+ (?:\.\d*)? | \.\d+ ) ) \s*\)
    | (?P<bracket> [()\[\]] )
    | (?P<text> [^\\()\[\]:]+ | : )
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\bBREAK\b")

_TAG = re.compile(rf"<\w+:[^<>]*>|<(?:{'|'.join(KINDS)}):[^<>]*", re.IGNORECASE)


def parse(text: str) -> list[Run]:
    """The runs of `text` from left to right; never fails. Neighbouring runs of equal weight are joined.

    Linear in the length of the text, because prompts come from strangers.
    """
    tokens = list(_TOKEN.finditer(text))
    weights, openers = _pair(tokens)

    # Brackets of one shape are closed in reverse order of opening, also where those of the other shape cross them. So
    # each shape has its own stack: the product of the weights of the brackets that are open.
    products = {"(": [1.0], "[": [1.0]}
    runs: list[tuple[list[str], float] | Break] = []
    for index, token in enumerate(tokens):
        if index in weights:
            stack = products[token[0]]
            stack.append(stack[-1] * weights[index])
        elif index in openers:
            products[tokens[openers[index]][0]].pop()
        else:
            weight = products["("][-1] * products["["][-1]
            for part in _literal(token):
                if isinstance(part, Break):
                    runs.append(part)
                # Joined before they are tokenized: `(un)(common)` is one word.
                elif runs and isinstance(last := runs[-1], tuple) and math.isclose(last[1], weight):
                    last[0].append(part)
                else:
                    runs.append(([part], weight))
    return [run if isinstance(run, Break) else ("".join(run[0]), run[1]) for run in runs]


def weight_of(text: str) -> float | None:
    """The weight in `(body:text)`; None if `text` is not a weight, so that the colon and it are part of the body."""
    match = _TOKEN.fullmatch(f":{text})")
    return float(match["weight"]) if match is not None and match["weight"] else None


def escape(text: str) -> str:
    """A prompt that is read as exactly `text`: brackets, backslashes and BREAK are escaped."""
    return re.sub(r"[\\()\[\]]|(?<=B)(?=REAK)", r"\\\g<0>", text)


def unsupported(text: str) -> list[str]:
    """The tags `<name:...>` in `text` that are still in it and are therefore read as text; each once, in order.

    Among them those of a known kind that have no name or no end.
    """
    return list(dict.fromkeys(_TAG.findall(text)))


def _pair(tokens: list[re.Match[str]]) -> tuple[dict[int, float], dict[int, int]]:
    """({opening bracket: weight}, {closing bracket: its opening one}), brackets as token numbers."""
    weights: dict[int, float] = {}
    openers: dict[int, int] = {}
    open_round: list[int] = []
    open_square: list[int] = []
    for index, token in enumerate(tokens):
        if token["bracket"] == "(":
            weights[index] = EMPHASIS
            open_round.append(index)
        elif token["bracket"] == "[":
            weights[index] = 1 / EMPHASIS
            open_square.append(index)
        elif token["bracket"] == "]" and open_square:
            openers[index] = open_square.pop()
        elif (token["bracket"] == ")" or token["weight"]) and open_round:
            openers[index] = opener = open_round.pop()
            if token["weight"]:
                weights[opener] = float(token["weight"])
    return weights, openers


def _literal(token: re.Match[str]) -> list[str | Break]:
    if token["escaped"] is not None:
        return [token["escaped"]] if token["escaped"] else []
    pieces: list[str | Break] = []
    parts = _BREAK.split(token[0])
    for number, part in enumerate(parts):
        if number > 0:
            pieces.append(Break())
            part = part.lstrip()
        if number < len(parts) - 1:
            part = part.rstrip()
        if part:
            pieces.append(part)
    return pieces

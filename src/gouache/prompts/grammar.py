r"""Emphasis in prompts, as A1111's web UI reads it: text to a tree, and a tree to weighted text.

    (a)       weight 1.1             [a]      weight 1 / 1.1
    (a:1.3)   weight 1.3             BREAK    what follows starts a new chunk of 75 tokens
    \( \) \[ \] \\   the character itself

Nested weights multiply. Every text is a prompt: a bracket that is never closed extends to the end, a closing bracket
without an opening one is text, and so is a malformed weight. Round and square brackets may overlap, `(a [b) c]`; the
tree then has a node for the overlap. Schedules, alternation and `AND` are read before this, by `schedule`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

EMPHASIS = 1.1


@dataclass(frozen=True)
class Text:
    """Text to be tokenized, without escapes."""

    text: str


@dataclass(frozen=True)
class Break:
    """The end of a chunk of tokens, also within brackets; weights around it have no effect on it."""


@dataclass(frozen=True)
class Sequence:
    """Parts in the order of the text."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Weighted:
    """A part with its weight, a factor on the weights of everything in it."""

    body: Node
    weight: float


Node = Text | Break | Sequence | Weighted

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

_TAG = re.compile(r"<\w+:[^<>]+>")


def parse(text: str) -> Sequence:
    """The tree of `text`; never fails."""
    tokens = list(_TOKEN.finditer(text))
    weights, openers = _pair(tokens)

    frames: list[tuple[int, list[Node]]] = [(-1, [])]  # an open bracket's token, and the parts since

    def close() -> int:
        opener, parts = frames.pop()
        if parts:
            frames[-1][1].append(Weighted(Sequence(tuple(parts)), weights[opener]))
        return opener

    for index, token in enumerate(tokens):
        if index in weights:
            frames.append((index, []))
        elif index in openers:
            crossed = []
            while (opener := close()) != openers[index]:
                crossed.append(opener)
            frames.extend((opener, []) for opener in reversed(crossed))
        else:
            frames[-1][1].extend(_literal(token))
    while len(frames) > 1:
        close()
    return Sequence(tuple(frames[0][1]))


def flatten(tree: Node) -> list[tuple[str, float] | Break]:
    """The tree's text from left to right as runs (text, weight), with the breaks between them.

    Neighbouring runs of equal weight are joined.
    """
    runs: list[tuple[list[str], float] | Break] = []
    pending: list[tuple[Node, float]] = [(tree, 1.0)]  # no recursion: brackets may be thousands deep
    while pending:
        node, weight = pending.pop()
        if isinstance(node, Sequence):
            pending.extend((part, weight) for part in reversed(node.parts))
        elif isinstance(node, Weighted):
            pending.append((node.body, weight * node.weight))
        elif isinstance(node, Break):
            runs.append(node)
        # Joined before they are tokenized: `(un)(common)` is one word.
        elif runs and isinstance(last := runs[-1], tuple) and math.isclose(last[1], weight):
            last[0].append(node.text)
        else:
            runs.append(([node.text], weight))
    return [run if isinstance(run, Break) else ("".join(run[0]), run[1]) for run in runs]


def escape(text: str) -> str:
    """A prompt that is read as exactly `text`: brackets, backslashes and BREAK are escaped."""
    return re.sub(r"[\\()\[\]]|(?<=B)(?=REAK)", r"\\\g<0>", text)


def unsupported(text: str) -> list[str]:
    """The tags `<name:...>` in `text` that are still in it and are therefore read as text; each once, in order."""
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


def _literal(token: re.Match[str]) -> list[Node]:
    if token["escaped"] is not None:
        return [Text(token["escaped"])] if token["escaped"] else []
    nodes: list[Node] = []
    parts = _BREAK.split(token[0])
    for number, part in enumerate(parts):
        if number > 0:
            nodes.append(Break())
            part = part.lstrip()
        if number < len(parts) - 1:
            part = part.rstrip()
        if part:
            nodes.append(Text(part))
    return nodes

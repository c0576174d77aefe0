r"""Prompts that change during sampling, and prompts composed with `AND`, as in AUTOMATIC1111's web UI 1.6 and later.

    [from:to:10]   "from" up to and including step 10, then "to"      [a|b|]    one option per step, in turn
    [to:10]        nothing, then "to"                                 a AND b :0.5   two prompts, the second weighs 0.5
    [from::10]     "from", then nothing

A number with a dot is a share of the steps (`[a:b:.4]`), one without is a step. All of these nest in each other and
within the brackets of emphasis. The texts that result are prompts in the language of `grammar`: emphasis brackets and
backslashes are still in them.

A bracket belongs to the prompt language only if everything up to its partner is well-formed: brackets inside it are
paired, `(...)` has at most one colon and `[...]` has either none, or bars alone, or one or two colons followed by a
number. All others are stray and stay text, as do colons outside a group. A bar outside an alternation, or a
backslash at the end or before a line break, makes the whole prompt plain text.

A1111 parses with an ambiguous grammar: with stray brackets in a prompt, its release of lark picks one of several
readings at random, differently in every process. Here each group that can be read is read. This is what A1111 always
does when no bracket is stray, and one of the things that it may do otherwise.

Everything here is linear in the length of the text (times the number of steps for `scheduled`) and iterative, because
prompts come from strangers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from gouache.errors import RequestError, printable
from gouache.prompts.grammar import MAX_WEIGHT


@dataclass(frozen=True)
class Span:
    """`text` is the prompt of every step after the previous span's `last` up to and including `last`, from 1."""

    last: int
    text: str


@dataclass(frozen=True)
class Part:
    """One of the prompts that `AND` composes; `weight` multiplies its guidance."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Text:
    """Text as written: backslashes and stray brackets included."""

    text: str


@dataclass(frozen=True)
class Emphasis:
    """`(body)` or `(body:weight)` where `bracket` is "(", `[body]` where it is "[".

    The weight is a prompt like the body: `(a:[1.2:1.4:10])` is possible, and so is `(a:b)`, which `grammar` reads as
    text.
    """

    bracket: Literal["(", "["]
    body: Nodes
    weight: Nodes | None = None


@dataclass(frozen=True)
class Switch:
    """`before` up to and including the step given by `when`, a number as written; then `after`."""

    before: Nodes
    after: Nodes
    when: str


@dataclass(frozen=True)
class Alternate:
    """At step s the option (s - 1) mod n, steps counted from 1."""

    options: tuple[Nodes, ...]


Node = Text | Emphasis | Switch | Alternate
Nodes = tuple[Node, ...]

# A1111's number has no other forms: no underscore, no "inf", digits in ASCII only.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
# A run of text is one token; an escaped character is text. What does not match is a backslash before a line break or
# at the end, which A1111's grammar has no rule for.
_TOKEN = re.compile(r"[\[\]():|]|(?:[^\\\[\]():|]|\\.)+")
_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")


def scheduled(text: str, steps: int, *, base_steps: int | None = None) -> tuple[Span, ...]:
    """The texts that hold during `steps` sampling steps, in order; the last span ends at `steps`.

    `base_steps`: this is the hires pass of `steps` steps, after a first pass of `base_steps`. A step then counts from
    the beginning of the first pass and a share from 1: `[a:b:1.5]` switches in the middle of the hires pass, and
    `[a:b:.5]` is over before it begins.

    Neighbours of equal text are one span. Raises ValueError if `steps` is less than 1, for no text.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    parsed = _parse(text)
    lasts = _lasts(parsed, steps, base_steps)
    spans: list[Span] = []
    for last in lasts:
        at_last = _render(parsed, last, steps, base_steps)
        if spans and spans[-1].text == at_last:
            spans.pop()
        spans.append(Span(last, at_last))
    return tuple(spans)


def composed(text: str) -> tuple[Part, ...]:
    """The parts of `text` between the words `AND`; one part if there is none.

    The last `:number` of a part is its weight, which holds for a prompt without `AND` too: "at 16:9" is "at 16" with
    weight 9. Whitespace around the colon and at the end is dropped. To be applied before `scheduled`, and to prompts
    only: A1111 does not compose negative prompts.

    Raises RequestError for a weight beyond use.
    """
    return tuple(_part(piece) for piece in _AND.split(text))


def tree(text: str) -> Nodes:
    """`text` as a tree, in which neighbouring texts are joined. `scheduled` does not need it; it shows a reading."""
    tokens, groups = _parse(text)
    top: list[Node | str] = []
    frames: list[_Frame] = []
    position = 0
    while position < len(tokens):
        frame = frames[-1] if frames else None
        if position in groups:
            frames.append(_Frame(groups[position]))
        elif frame and position in frame.separators:
            frame.parts.append([])
            if frame.group.when is not None and position == frame.group.separators[-1]:
                position = frame.group.close - 1  # the number is not part of the tree
        elif frame and position == frame.group.close:
            frames.pop()
            (frames[-1].parts[-1] if frames else top).append(frame.node(tokens))
        else:
            (frame.parts[-1] if frame else top).append(tokens[position])
        position += 1
    return _joined(top)


def switch_step(when: str, steps: int, *, base_steps: int | None = None) -> int:
    """The last step before a switch at the number `when`, at most `steps`; 0 if the new text holds from the start.

    `base_steps` as for `scheduled`.
    """
    value = float(when)
    if "." in when:
        value = (value - (0.0 if base_steps is None else 1.0)) * steps
    else:
        value -= base_steps or 0
    # `int` has no result for the infinity that a long number is.
    return steps if value >= steps else max(int(max(value, -1.0)), 0)


class _Group(NamedTuple):
    """A well-formed pair of brackets; all numbers are token numbers. `separators` are those directly inside it."""

    kind: Literal["emphasis", "switch", "alternate"]
    open: int
    close: int
    separators: tuple[int, ...]
    when: str | None = None

    def branch(self, step: int, last: int) -> tuple[int, int]:
        """The tokens, as (start, stop), that hold at `step`; in a switch the old text holds up to step `last`."""
        edges = (self.open, *self.separators, self.close)
        if self.kind == "alternate":
            option = (step - 1) % (len(edges) - 1)
        elif len(self.separators) == 2:
            option = 0 if step <= last else 1
        elif step <= last:
            return self.open, self.open
        else:
            option = 0
        return edges[option] + 1, edges[option + 1]


class _Parsed(NamedTuple):
    """`groups` by the token number of their opening bracket. A prompt that is plain text has one token."""

    tokens: list[str]
    groups: dict[int, _Group]


@dataclass
class _Open:
    """A bracket that may become a group: it does not once something inside it is stray."""

    position: int
    separators: list[int] = field(default_factory=list)
    well_formed: bool = True


class _Frame:
    """A group on the way into the tree: the nodes of each part between its separators."""

    def __init__(self, group: _Group) -> None:
        self.group = group
        self.separators = frozenset(group.separators)
        self.parts: list[list[Node | str]] = [[]]

    def node(self, tokens: list[str]) -> Node:
        parts = [_joined(part) for part in self.parts]
        if self.group.kind == "alternate":
            return Alternate(tuple(parts))
        if self.group.when is not None:  # the part after the last colon is the number
            return Switch(parts[0] if len(parts) == 3 else (), parts[-2], self.group.when)
        bracket: Literal["(", "["] = "(" if tokens[self.group.open] == "(" else "["
        return Emphasis(bracket, parts[0], parts[1] if len(parts) == 2 else None)


def _joined(parts: list[Node | str]) -> Nodes:
    nodes: list[Node] = []
    pieces: list[str] = []
    for part in [*parts, None]:
        if isinstance(part, str):
            pieces.append(part)
            continue
        if pieces:
            nodes.append(Text("".join(pieces)))
            pieces.clear()
        if part is not None:
            nodes.append(part)
    return tuple(nodes)


def _parse(text: str) -> _Parsed:
    tokens = _tokens(text)
    if tokens is None:
        return _Parsed([text], {})

    groups: dict[int, _Group] = {}
    opened: list[_Open] = []
    bars = 0
    for position, token in enumerate(tokens):
        if token in ("(", "["):
            opened.append(_Open(position))
        elif token in (":", "|"):
            bars += token == "|"
            if opened:
                opened[-1].separators.append(position)
        elif token in (")", "]") and opened:
            if tokens[opened[-1].position] + token not in ("()", "[]"):
                opened.clear()  # every group around the two would hold an unpaired bracket
                continue
            group = _group(opened.pop(), position, tokens)
            if group is not None:
                groups[group.open] = group
                bars -= len(group.separators) if group.kind == "alternate" else 0
            elif opened:
                opened[-1].well_formed = False
    return _Parsed(tokens, groups) if bars == 0 else _Parsed([text], {})


def _tokens(text: str) -> list[str] | None:
    """None where A1111's grammar has no token."""
    tokens: list[str] = []
    end = 0
    for match in _TOKEN.finditer(text):
        if match.start() != end:
            return None
        tokens.append(match[0])
        end = match.end()
    return tokens if end == len(text) else None


def _group(opened: _Open, close: int, tokens: list[str]) -> _Group | None:
    """The group that ends at `close`, or None if what is inside is not well-formed."""
    if not opened.well_formed:
        return None
    separators = tuple(opened.separators)
    kinds = {tokens[position] for position in separators}
    if len(separators) == 0:
        return _Group("emphasis", opened.position, close, separators)
    if tokens[close] == ")":
        colon_only = kinds == {":"} and len(separators) == 1
        return _Group("emphasis", opened.position, close, separators) if colon_only else None
    if kinds == {"|"}:
        return _Group("alternate", opened.position, close, separators)
    if kinds == {":"} and len(separators) <= 2 and separators[-1] + 2 == close:
        when = tokens[close - 1].strip()
        if _NUMBER.fullmatch(when):
            return _Group("switch", opened.position, close, separators, when)
    return None


def _lasts(parsed: _Parsed, steps: int, base_steps: int | None) -> list[int]:
    """The steps after which the text may change, and the last step."""
    lasts = {steps}
    for group in parsed.groups.values():
        if group.kind == "alternate":
            return list(range(1, steps + 1))
        if group.when is not None:
            lasts.add(switch_step(group.when, steps, base_steps=base_steps))
    return sorted(lasts - {0})


def _render(parsed: _Parsed, step: int, steps: int, base_steps: int | None) -> str:
    tokens, groups = parsed
    pieces: list[str] = []
    position, end = 0, len(tokens)
    around: list[tuple[int, int]] = []  # where to go on after the branch, and where that ends
    while True:
        if position == end:
            if not around:
                return "".join(pieces)
            position, end = around.pop()
            continue
        group = groups.get(position)
        if group is None or group.kind == "emphasis":
            pieces.append(tokens[position])
            position += 1
        else:
            last = switch_step(group.when, steps, base_steps=base_steps) if group.when is not None else 0
            around.append((group.close + 1, end))
            position, end = group.branch(step, last)


def _part(text: str) -> Part:
    text = text.rstrip()
    before, colon, number = text.rpartition(":")
    number = number.strip()
    if colon and _WEIGHT.fullmatch(number):
        if not abs(float(number)) <= MAX_WEIGHT:
            raise RequestError(
                "prompt", f"has a weight of {printable(number, 40)} at its end; expected at most {MAX_WEIGHT:g}"
            )
        return Part(before.rstrip(), float(number))
    return Part(text)

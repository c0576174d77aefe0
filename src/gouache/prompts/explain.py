"""How a prompt is read, as text for people: parts, tree, and the tokens and weights of every span of steps."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from itertools import groupby

from gouache.errors import printable
from gouache.prompts.chunks import CHUNK_TOKENS, Chunk, Token, chunk
from gouache.prompts.grammar import EMPHASIS, weight_of
from gouache.prompts.schedule import (
    Alternate,
    Emphasis,
    Nodes,
    Part,
    Span,
    Switch,
    Text,
    composed,
    scheduled,
    switch_step,
    tree,
)
from gouache.prompts.tokenizer import Tokenizer

_DEEPEST = 30  # levels of indentation; a line for each of thousands of brackets must not be thousands of spaces long
_MOST_RANGES = 6


def explain(
    text: str,
    steps: int,
    tokenizer: Tokenizer,
    embeddings: Mapping[str, int] | None = None,
    *,
    hires_steps: int | None = None,
    negative: bool = False,
    plain: bool = False,
) -> str:
    """How the prompt `text` is read in a run of `steps` steps; several lines without a line break at the end.

    `embeddings` {name: number of vectors}. `hires_steps`: a hires pass of so many steps follows. `negative`: this is a
    negative prompt, which `AND` does not compose. `plain`: brackets do not weight, as with emphasis "none".
    """
    parts = (Part(text),) if negative else composed(text)
    passes: list[tuple[str, int, int | None]] = [("step", steps, None)]
    if hires_steps is not None:
        passes.append(("hires step", hires_steps, steps))
    lines: list[str] = []
    for number, part in enumerate(parts, 1):
        name = "prompt" if len(parts) == 1 else f"part {number} of {len(parts)}"
        lines.append(f"{name}, weight {part.weight:g}: {_quoted(part.text)}")
        nodes = tree(part.text)
        lines.append("  tree:" if nodes else "  tree: empty")
        lines.extend(_tree(nodes, steps, hires_steps, plain))
        for unit, count, base_steps in passes:
            for when, span_text in _by_text(scheduled(part.text, count, base_steps=base_steps)):
                lines.append(f"  {unit}{when}: {_quoted(span_text)}")
                for index, each in enumerate(chunk(span_text, tokenizer, embeddings, plain=plain), 1):
                    lines.append(f"    chunk {index}: {len(each)} of {CHUNK_TOKENS} tokens")
                    lines.extend(f"      {line}" for line in _runs(each, tokenizer))
    return "\n".join(lines)


def _tree(nodes: Nodes, steps: int, hires_steps: int | None, plain: bool) -> Iterator[str]:
    pending: list[tuple[int, object]] = [(2, node) for node in reversed(nodes)]  # no recursion: brackets may be deep
    while pending:
        depth, node = pending.pop()
        title = ""
        branches: list[tuple[str, Nodes]] = []
        match node:
            case str():
                title = node
            case Text(text):
                title = f"text {_quoted(text)}"
            case Emphasis(bracket, body, weight):
                title = "round brackets" if bracket == "(" else "square brackets"
                branches = [("", body)]
                factor = EMPHASIS if bracket == "(" else 1 / EMPHASIS
                if weight is not None:
                    match weight:
                        case (Text(text),) if (given := weight_of(text)) is not None:
                            factor = given
                        case () | (Text(_),):  # a colon without a weight is text
                            branches = [("", _with_text(body, "".join([":", *(part.text for part in weight)])))]
                        case _:
                            branches = [("body", body), ("weight", weight)]
                if not plain and len(branches) == 1:
                    title += f", weight {factor:.4g}"
            case Switch(before, after, when):
                title = f"switch at {when}: {_switch(when, steps, hires_steps)}"
                branches = [("before", before), ("after", after)]
            case Alternate(options):
                title = f"alternation of {len(options)} options"
                branches = [(f"option {number}", option) for number, option in enumerate(options, 1)]
        yield "  " * min(depth, _DEEPEST) + title
        inner: list[tuple[int, object]] = []
        for name, branch in branches:
            if name:
                inner.append((depth + 1, f"{name}:" if branch else f"{name}: nothing"))
            inner.extend((depth + (2 if name else 1), each) for each in branch)
        pending.extend(reversed(inner))


def _with_text(nodes: Nodes, text: str) -> Nodes:
    match nodes:
        case (*before, Text(last)):
            return (*before, Text(last + text))
    return (*nodes, Text(text))


def _switch(when: str, steps: int, hires_steps: int | None) -> str:
    first = _last_before(switch_step(when, steps), steps)
    if hires_steps is None:
        return first
    return f"{first}; hires pass: {_last_before(switch_step(when, hires_steps, base_steps=steps), hires_steps)}"


def _last_before(last: int, steps: int) -> str:
    if last == 0:
        return "the new text from the start"
    return "the old text to the end" if last == steps else f"after step {last} of {steps}"


def _by_text(spans: tuple[Span, ...]) -> Iterator[tuple[str, str]]:
    """(steps, text) for each text, in the order of its first step: (" 1", "a"), ("s 2-5, 8", "b")."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    first = 1
    for span in spans:
        ranges.setdefault(span.text, []).append((first, span.last))
        first = span.last + 1
    for text, found in ranges.items():
        names = [str(start) if start == last else f"{start}-{last}" for start, last in found]
        if len(names) > _MOST_RANGES:
            names = [*names[: _MOST_RANGES - 2], "...", names[-1]]
        plural = len(found) > 1 or found[0][0] != found[0][1]
        yield f"{'s' if plural else ''} {', '.join(names)}", text


def _runs(tokens: Chunk, tokenizer: Tokenizer) -> Iterator[str]:
    """A line for each run of tokens that have one weight, and for each embedding."""

    def key(token: Token) -> tuple[float, str | None]:
        return token.weight, token.vector[0] if token.vector else None

    for (weight, embedding), run in groupby(tokens, key):
        ids = [token.id for token in run]
        if embedding is None:
            yield f"{weight:<6.4g} {_quoted(tokenizer.decode(ids))}"
        else:
            yield f"{weight:<6.4g} embedding {_quoted(embedding)}, {len(ids)} vector{'s' if len(ids) != 1 else ''}"


def _quoted(text: str) -> str:
    """In quotes, without truncation, because the end of a prompt matters here."""
    return '"' + printable(text.replace("\n", "\\n").replace("\t", "\\t"), sys.maxsize) + '"'

"""A prompt of any length as chunks of at most 75 tokens: CLIP has 77 positions, two of them for begin and end.

As in A1111's web UI: BREAK ends a chunk; a full chunk ends at its last comma, if that is among its last 20 tokens,
so that a phrase is not cut in two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from gouache.prompts.grammar import Break, flatten, parse
from gouache.prompts.tokenizer import Tokenizer

CHUNK_TOKENS = 75
COMMA_BACKTRACK = 20
PLACEHOLDER = 0  # the token id at the positions of an embedding's vectors; any but begin and end would do


class Token(NamedTuple):
    """`vector` (name of an embedding, row in it) replaces the token's own vector; None: not an embedding."""

    id: int
    weight: float
    vector: tuple[str, int] | None = None


Chunk = list[Token]
"""Without begin, end and padding."""


def chunk(
    text: str, tokenizer: Tokenizer, embeddings: Mapping[str, int] | None = None, *, plain: bool = False
) -> list[Chunk]:
    """The chunks of the prompt `text`; at least one, which is empty for an empty prompt.

    `embeddings` {name: number of vectors} are found wherever their name occurs, in upper or lower case, and are not
    divided between chunks. `plain`: brackets, backslashes and BREAK are text, and all weights are 1.
    """
    comma = tokenizer.id(",</w>")
    known = _by_first_token(embeddings or {}, tokenizer)
    full: list[Chunk] = []
    current: Chunk = []
    bare = _bare(text, embeddings or {})
    for run in [(bare, 1.0)] if plain else flatten(parse(bare)):
        if isinstance(run, Break):
            full.append(current)
            current = []
            continue
        words, weight = run
        tokens = tokenizer.encode(words)
        position = 0
        while position < len(tokens):
            name, length = _embedding_at(tokens, position, known)
            if name is not None:
                count = (embeddings or {})[name]
                if len(current) + count > CHUNK_TOKENS:
                    full.append(current)
                    current = []
                current += [Token(PLACEHOLDER, weight, (name, row)) for row in range(count)]
                position += length
                continue
            token = tokens[position]
            if len(current) == CHUNK_TOKENS:
                stop = CHUNK_TOKENS if token == comma else _phrase_end(current, comma)
                full.append(current[:stop])
                current = current[stop:]
            current.append(Token(token, weight))
            position += 1
    return [*full, current] if current or not full else full


def _bare(text: str, embeddings: Mapping[str, int]) -> str:
    """`text` with ComfyUI's `embedding:name` reduced to the name, where an embedding has that name."""
    names = {name.casefold() for name in embeddings}

    def bare(match: re.Match[str]) -> str:
        name = re.sub(r"\.(safetensors|pt|bin)$", "", match[1])
        return name if name.casefold() in names else match[0]

    return re.sub(r"\bembedding:([^\s,:()\[\]]+)", bare, text)


def _by_first_token(embeddings: Mapping[str, int], tokenizer: Tokenizer) -> dict[int, list[tuple[list[int], str]]]:
    """{first token: [(the name's tokens, name)]}, longer names first."""
    found: dict[int, list[tuple[list[int], str]]] = {}
    for name in embeddings:
        if tokens := tokenizer.encode(name):
            found.setdefault(tokens[0], []).append((tokens, name))
    for entries in found.values():
        entries.sort(key=lambda entry: -len(entry[0]))
    return found


def _embedding_at(
    tokens: list[int], position: int, known: Mapping[int, list[tuple[list[int], str]]]
) -> tuple[str | None, int]:
    for name_tokens, name in known.get(tokens[position], ()):
        if tokens[position : position + len(name_tokens)] == name_tokens:
            return name, len(name_tokens)
    return None, 0


def _phrase_end(tokens: Chunk, comma: int | None) -> int:
    for index in range(len(tokens) - 1, len(tokens) - 1 - COMMA_BACKTRACK, -1):
        if tokens[index].id == comma and tokens[index].vector is None:
            return index + 1
    return len(tokens)

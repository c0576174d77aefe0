"""A prompt of any length as chunks of at most 75 tokens: CLIP has 77 positions, two of them for begin and end.

As in A1111's web UI: BREAK ends a chunk; a full chunk ends at its last comma, if that is among its last 20 tokens,
so that a phrase is not cut in two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gouache.prompts.embedding_names import split
from gouache.prompts.grammar import Break, parse
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

    `embeddings` {name: number of vectors} replace their names wherever these occur (`embedding_names`), and are not
    divided between chunks. `plain`: brackets, backslashes and BREAK are text, and all weights are 1.
    """
    comma = tokenizer.id(",</w>")
    embeddings = embeddings or {}
    full: list[Chunk] = []
    current: Chunk = []
    for run in [(text, 1.0)] if plain else parse(text):
        if isinstance(run, Break):
            full.append(current)
            current = []
            continue
        for words, name in split(run[0], embeddings):
            if name is not None:
                count = embeddings[name]
                if len(current) + count > CHUNK_TOKENS:
                    full.append(current)
                    current = []
                current += [Token(PLACEHOLDER, run[1], (name, row)) for row in range(count)]
                continue
            for token in tokenizer.encode(words):
                if len(current) == CHUNK_TOKENS:
                    stop = CHUNK_TOKENS if token == comma else _phrase_end(current, comma)
                    full.append(current[:stop])
                    current = current[stop:]
                current.append(Token(token, run[1]))
    return [*full, current] if current or not full else full


def _phrase_end(tokens: Chunk, comma: int | None) -> int:
    for index in range(len(tokens) - 1, len(tokens) - 1 - COMMA_BACKTRACK, -1):
        if tokens[index].id == comma and tokens[index].vector is None:
            return index + 1
    return len(tokens)

"""A prompt of any length as chunks of at most 75 tokens, which is what CLIP's 77 positions leave for text.

As in A1111's web UI: BREAK ends a chunk; a full chunk ends at its last comma, if that is among its last 20 tokens,
so that a phrase is not cut in two.
"""

from __future__ import annotations

from gouache.prompts.grammar import Break, flatten, parse
from gouache.prompts.tokenizer import Tokenizer

CHUNK_TOKENS = 75
COMMA_BACKTRACK = 20

Chunk = list[tuple[int, float]]
"""(token id, weight), without begin, end and padding."""


def chunk(text: str, tokenizer: Tokenizer) -> list[Chunk]:
    """The chunks of the prompt `text`; at least one, which is empty for an empty prompt."""
    comma = tokenizer.id(",</w>")
    full: list[Chunk] = []
    current: Chunk = []
    for run in flatten(parse(text)):
        if isinstance(run, Break):
            full.append(current)
            current = []
            continue
        words, weight = run
        for token in tokenizer.encode(words):
            if len(current) == CHUNK_TOKENS:
                stop = CHUNK_TOKENS if token == comma else _phrase_end(current, comma)
                full.append(current[:stop])
                current = current[stop:]
            current.append((token, weight))
    return [*full, current] if current or not full else full


def _phrase_end(tokens: Chunk, comma: int | None) -> int:
    for index in range(len(tokens) - 1, len(tokens) - 1 - COMMA_BACKTRACK, -1):
        if tokens[index][0] == comma:
            return index + 1
    return len(tokens)

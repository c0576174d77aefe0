from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gouache.prompts.chunks import chunk
from gouache.prompts.tokenizer import Tokenizer

CAT, DOG, COMMA = 2368, 1929, 267


def chunk_ids(text: str, tokenizer: Tokenizer) -> list[list[int]]:
    return [[token.id for token in part] for part in chunk(text, tokenizer)]


def weighted(text: str, tokenizer: Tokenizer) -> list[list[tuple[int, float]]]:
    return [[(token.id, token.weight) for token in part] for part in chunk(text, tokenizer)]


def test_an_empty_prompt_is_one_empty_chunk(tokenizer: Tokenizer):
    assert chunk("", tokenizer) == [[]]
    assert chunk(" () ", tokenizer) == [[]]


def test_every_token_of_a_run_has_its_weight(tokenizer: Tokenizer):
    assert weighted("cat (dog cat:1.5), [dog]", tokenizer) == [
        [(CAT, 1.0), (DOG, 1.5), (CAT, 1.5), (COMMA, 1.0), (DOG, pytest.approx(1 / 1.1))]
    ]


def test_seventy_five_tokens_fill_a_chunk(tokenizer: Tokenizer):
    assert chunk_ids("cat " * 75, tokenizer) == [[CAT] * 75]
    assert chunk_ids("cat " * 76, tokenizer) == [[CAT] * 75, [CAT]]
    assert chunk_ids("cat " * 160, tokenizer) == [[CAT] * 75, [CAT] * 75, [CAT] * 10]


@pytest.mark.parametrize("before", [55, 60, 73, 74])
def test_a_phrase_after_a_late_comma_moves_to_the_next_chunk_undivided(before: int, tokenizer: Tokenizer):
    text = "cat " * before + "," + " dog" * 30

    assert chunk_ids(text, tokenizer) == [[CAT] * before + [COMMA], [DOG] * 30]


def test_a_comma_more_than_twenty_tokens_back_does_not_end_the_chunk(tokenizer: Tokenizer):
    text = "cat " * 54 + "," + " dog" * 30

    assert chunk_ids(text, tokenizer) == [[CAT] * 54 + [COMMA] + [DOG] * 20, [DOG] * 10]


def test_a_comma_as_the_seventy_sixth_token_ends_its_own_phrase(tokenizer: Tokenizer):
    text = "cat " * 60 + "," + " dog" * 14 + ", cat"

    assert chunk_ids(text, tokenizer) == [[CAT] * 60 + [COMMA] + [DOG] * 14, [COMMA, CAT]]


def test_commas_of_one_chunk_do_not_end_the_next(tokenizer: Tokenizer):
    text = "cat " * 70 + "," + " dog" * 80

    assert chunk_ids(text, tokenizer) == [[CAT] * 70 + [COMMA], [DOG] * 75, [DOG] * 5]


def test_moved_tokens_keep_their_weights(tokenizer: Tokenizer):
    text = "cat " * 60 + ", (" + "dog " * 20 + ":1.3)"

    assert weighted(text, tokenizer)[1] == [(DOG, 1.3)] * 20


def test_break_ends_a_chunk_at_any_position(tokenizer: Tokenizer):
    assert chunk_ids("cat BREAK dog", tokenizer) == [[CAT], [DOG]]
    assert chunk_ids("(cat BREAK dog:1.2) BREAK", tokenizer) == [[CAT], [DOG]]
    assert chunk_ids("BREAK dog BREAK BREAK cat", tokenizer) == [[], [DOG], [], [CAT]]
    assert chunk_ids("cat " * 75 + "BREAK dog", tokenizer) == [[CAT] * 75, [DOG]]


@given(words=st.lists(st.sampled_from(["cat", "dog", ","]) | st.just("dog"), max_size=260))
@settings(deadline=None)
def test_chunks_end_after_the_last_comma_in_range_and_lose_no_token(words: list[str], tokenizer: Tokenizer):
    rest = tokenizer.encode(" ".join(words))

    parts = chunk_ids(" ".join(words), tokenizer)

    assert [token for part in parts for token in part] == rest
    for part in parts[:-1]:
        in_range = [index for index in range(55, 75) if rest[index] == COMMA]
        expected = in_range[-1] + 1 if in_range and rest[75] != COMMA else 75
        assert len(part) == expected
        rest = rest[expected:]
    assert len(rest) <= 75

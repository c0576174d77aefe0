"""Names of embeddings in prompts, compared with A1111's rule on tokens."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gouache.prompts.chunks import chunk
from gouache.prompts.embedding_names import renamed, split, used
from gouache.prompts.grammar import escape
from gouache.prompts.tokenizer import Tokenizer

# Words that CLIP divides alike in any neighbourhood: punctuation is one character and never beside another.
WORDS = st.lists(st.sampled_from(["foo", "Bar", "FOO", "7", "bad", "é", "- foo", ". 7", "_ bar", "(", ")"]), min_size=1)


def by_tokens(text: str, names: list[str], tokenizer: Tokenizer) -> list[int | str]:
    """A1111's rule: where the tokens of a name occur in those of the text, that of most tokens replaces them."""
    tokens = tokenizer.encode(text)
    found: list[int | str] = []
    position = 0
    while position < len(tokens):
        matching = [
            (len(ids), name)
            for name in names
            if (ids := tokenizer.encode(name)) == tokens[position : position + len(ids)] and ids
        ]
        length, name = max(matching, key=lambda each: each[0], default=(1, tokens[position]))
        found.append(name)
        position += length
    return found


def in_chunks(text: str, names: list[str], tokenizer: Tokenizer) -> list[int | str]:
    tokens = [token for part in chunk(text, tokenizer, dict.fromkeys(names, 1), plain=True) for token in part]
    return [token.vector[0] if token.vector is not None else token.id for token in tokens]


@given(text=WORDS.map(" ".join), names=st.lists(WORDS.map(" ".join), max_size=3, unique_by=lambda name: name.lower()))
@settings(deadline=None)
def test_names_replace_the_tokens_that_they_have_in_a1111(text: str, names: list[str], tokenizer: Tokenizer):
    assert in_chunks(text, names, tokenizer) == by_tokens(text, names, tokenizer)


@pytest.mark.parametrize(
    "name", ["foo (v2)", "foo [x]", "a\\b", "\\", "(x", "x]", "style (a) [b]", "foo-v1.5", "it's", "猫 (2)", "BREAK it"]
)
@pytest.mark.parametrize("around", ["a {}, on red", "{}", "({}:1.2)", "{}.", "a ({}), b", "«{}»", "{} {}", "[{}]"])
def test_a_name_is_found_where_the_prompt_has_it_escaped(name: str, around: str, tokenizer: Tokenizer):
    def read(name: str, written: str) -> list[list[tuple[int, float, object]]]:
        parts = chunk(around.replace("{}", written), tokenizer, {name: 2})
        return [[(token.id, token.weight, token.vector and token.vector[1]) for token in part] for part in parts]

    found = read(name, escape(name))

    assert found == read("zorblax", "zorblax")
    assert sum(row is not None for _, _, row in found[0]) == 2 * around.count("{}")


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("embedding:inner, red", "inner", ", red"),
        ("a Embedding:Sub/deep/inner.pt", "inner", "a "),
        ("embedding: inner.safetensors x", "inner", " x"),
        ("inner.safetensors", "inner", ".safetensors"),
        ("embedding:sub\\inner", "inner", ""),
        ("embedding:innermost", "inner", "embedding:innermost"),
        ("fembedding:inner", "inner", "fembedding:"),
    ],
)
def test_comfyuis_prefix_is_a_part_of_the_name(text: str, name: str, expected: str):
    assert "".join(words for words, found in split(text, [name]) if found is None) == expected


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("foobar", "foo"),
        ("barfoo", "foo"),
        ("foobar", "foo bar"),
        ("cat's", "s"),
        ("don't", "t"),
        ("a cat", ""),
        ("", "x"),
    ],
)
def test_parts_of_words_are_no_names(text: str, name: str):
    assert split(text, [name]) == [(text, None)] and used([text], [name]) == []


def test_a_name_within_a_longer_one_is_not_used():
    assert used(["a foo (v2) cat"], ["foo", "foo (v2)", "dog"]) == ["foo (v2)"]
    assert used(["a foo (v2) foo cat"], ["foo", "foo (v2)", "dog"]) == ["foo", "foo (v2)"]


@pytest.mark.parametrize("text", ["embedding:" * 20_000, "embedding:a/" * 20_000, "foo " * 20_000, "a " + " " * 50_000])
def test_hostile_prompts_are_searched_quickly(text: str):
    start = time.process_time()

    split(text, ["foo", "a b", "foo (v2)"])

    assert time.process_time() - start < 5


@given(WORDS.map(" ".join))
@settings(max_examples=50, deadline=None)
def test_a_name_is_replaced_where_a_prompt_means_it(text: str):
    """And nowhere else, as in longer words."""
    meant = [words for words, name in split(text, ["foo"]) if name is not None]
    assert renamed(text, "foo", "new (v2)").lower().replace("new (v2)", "foo") == text.lower()
    assert renamed(text, "foo", "new (v2)").count("new (v2)") == len(meant)


@pytest.mark.parametrize(
    ("text", "old", "new", "expected"),
    [
        ("a emt on red, emtly, Emt, an emt's", "emt", r"a\b", r"a a\b on red, emtly, a\b, an a\b's"),
        ("a cat on a mat", "a", "zorb", "zorb cat on zorb mat"),
        ("a big  cat, bigcat", "big cat", "c", "a c, bigcat"),
    ],
)
def test_a_name_is_not_replaced_in_longer_words(text: str, old: str, new: str, expected: str):
    assert renamed(text, old, new) == expected

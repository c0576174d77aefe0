"""The text that explains a prompt."""

from __future__ import annotations

import math
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gouache.prompts.explain import explain
from gouache.prompts.grammar import parse
from gouache.prompts.tokenizer import Tokenizer


def expected(text: str) -> str:
    return dedent(text).strip("\n")


def test_a_plain_prompt(tokenizer: Tokenizer):
    assert explain("a cat, 4k", 25, tokenizer) == expected(
        """
        prompt, weight 1: "a cat, 4k"
          tree:
            text "a cat, 4k"
          steps 1-25: "a cat, 4k"
            chunk 1: 5 of 75 tokens
              1      "a cat , 4 k"
        """
    )


def test_an_empty_prompt(tokenizer: Tokenizer):
    assert explain("", 1, tokenizer) == expected(
        """
        prompt, weight 1: ""
          tree: empty
          step 1: ""
            chunk 1: 0 of 75 tokens
        """
    )


def test_a_switch_names_its_steps_in_both_passes(tokenizer: Tokenizer):
    assert explain("a [cat:(dog:1.3):0.4]", 25, tokenizer, hires_steps=10) == expected(
        """
        prompt, weight 1: "a [cat:(dog:1.3):0.4]"
          tree:
            text "a "
            switch at 0.4: after step 10 of 25; hires pass: the new text from the start
              before:
                text "cat"
              after:
                round brackets, weight 1.3
                  text "dog"
          steps 1-10: "a cat"
            chunk 1: 2 of 75 tokens
              1      "a cat"
          steps 11-25: "a (dog:1.3)"
            chunk 1: 2 of 75 tokens
              1      "a"
              1.3    "dog"
          hires steps 1-10: "a (dog:1.3)"
            chunk 1: 2 of 75 tokens
              1      "a"
              1.3    "dog"
        """
    )


def test_parts_breaks_alternation_and_embeddings(tokenizer: Tokenizer):
    text = "[cat|] BREAK mystyle AND [dog::30] ([sky]:[1.2:1.4:1]) :-0.5"

    assert explain(text, 8, tokenizer, {"mystyle": 3}) == expected(
        """
        part 1 of 2, weight 1: "[cat|] BREAK mystyle"
          tree:
            alternation of 2 options
              option 1:
                text "cat"
              option 2: nothing
            text " BREAK mystyle"
          steps 1, 3, 5, 7: "cat BREAK mystyle"
            chunk 1: 1 of 75 tokens
              1      "cat"
            chunk 2: 3 of 75 tokens
              1      embedding "mystyle", 3 vectors
          steps 2, 4, 6, 8: " BREAK mystyle"
            chunk 1: 0 of 75 tokens
            chunk 2: 3 of 75 tokens
              1      embedding "mystyle", 3 vectors
        part 2 of 2, weight -0.5: " [dog::30] ([sky]:[1.2:1.4:1])"
          tree:
            text " "
            switch at 30: the old text to the end
              before:
                text "dog"
              after: nothing
            text " "
            round brackets
              body:
                square brackets, weight 0.9091
                  text "sky"
              weight:
                switch at 1: after step 1 of 8
                  before:
                    text "1.2"
                  after:
                    text "1.4"
          step 1: " dog ([sky]:1.2)"
            chunk 1: 2 of 75 tokens
              1      "dog"
              1.091  "sky"
          steps 2-8: " dog ([sky]:1.4)"
            chunk 1: 2 of 75 tokens
              1      "dog"
              1.273  "sky"
        """
    )


@pytest.mark.parametrize(
    "text", ["(storm:1.2.3)", "(a)", "[a]", "((a:2))", "[(a:.5)]", "(a:)", "(a:b)", "(a: -1.5 )", "[(a:x)]", "(a:1e3)"]
)
def test_the_tree_shows_the_weights_that_are_used(text: str, tokenizer: Tokenizer):
    lines = explain(text, 1, tokenizer).splitlines()
    weights = [float(line.rpartition(" weight ")[2]) for line in lines if "brackets" in line]
    written = [line.split('"')[1] for line in lines if line.lstrip().startswith("text ")]

    assert parse(text) == [("".join(written), pytest.approx(math.prod(weights), rel=1e-3))]


def test_many_changes_are_abbreviated(tokenizer: Tokenizer):
    assert "  steps 2, 4, 6, 8, ..., 30: " in explain("[a|b]", 30, tokenizer)


def test_a_negative_prompt_is_not_composed_and_a_plain_one_has_no_weights(tokenizer: Tokenizer):
    composed = explain("bad AND ugly :2", 5, tokenizer)
    negative = explain("bad AND ugly :2", 5, tokenizer, negative=True)
    plain = explain("(cat:1.5)", 5, tokenizer, plain=True)

    assert composed.startswith('part 1 of 2, weight 1: "bad"\n')
    assert negative.startswith('prompt, weight 1: "bad AND ugly :2"\n')
    assert plain.endswith('\n    chunk 1: 7 of 75 tokens\n      1      "( cat : 1 . 5 )"')


def test_line_breaks_and_control_characters_are_escaped(tokenizer: Tokenizer):
    explained = explain("a\nb\x1b[31m \u202e", 2, tokenizer)

    assert "\\n" in explained and "\\x1b" in explained and "\\x202e" in explained
    assert all(line.isprintable() for line in explained.split("\n"))


@pytest.mark.parametrize("text", ["[a:" * 3000 + ":3]" * 3000, "[a|" * 3000 + "]" * 3000, "(" * 5000 + ")" * 5000])
def test_deep_nesting_is_explained_without_recursion_in_a_bounded_length(text: str, tokenizer: Tokenizer):
    assert len(explain(text, 3, tokenizer)) < 400 * len(text)


@given(
    text=st.lists(st.sampled_from(["a", "[", "]", "(", ")", ":", "|", ":3]", ":.5]", "\\", " AND ", " BREAK "])).map(
        "".join
    )
    | st.text(),
    hires_steps=st.none() | st.integers(1, 9),
)
@settings(deadline=None, max_examples=50)
def test_any_text_is_explained(text: str, hires_steps: int | None, tokenizer: Tokenizer):
    assert explain(text, 4, tokenizer, hires_steps=hires_steps).startswith(("prompt, weight ", "part 1 of "))

"""Comments in prompts, which A1111 drops by default: from `#` to the end of the line."""

from __future__ import annotations

import pytest

from gouache.prompts.tags import strip_comments


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat # a dog", "a cat"),
        ("# first\na cat\n# last", "a cat"),
        ("a cat, #note\nred", "a cat,\nred"),
        ("a cat", "a cat"),
        ("", ""),
        ("#", ""),
        ("a\nb", "a\nb"),
    ],
)
def test_a_comment_ends_with_its_line(text: str, expected: str):
    assert strip_comments(text) == expected

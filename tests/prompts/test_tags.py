"""Removing tags from prompts."""

from __future__ import annotations

import pytest

from gouache.prompts.tags import Tag, take_tags


@pytest.mark.parametrize(
    ("text", "bare", "tags"),
    [
        ("a cat", "a cat", []),
        ("a cat <lora:some style:0.8>, night", "a cat , night", [Tag("lora", "some style:0.8")]),
        ("<lyco:x:te=0.5:unet=1><hypernet:y>", "", [Tag("lyco", "x:te=0.5:unet=1"), Tag("hypernet", "y")]),
        ("<LORA:Folder/x:1>", "", [Tag("lora", "Folder/x:1")]),
        ("1 <2 and <other:thing> stay", "1 <2 and <other:thing> stay", []),
        ("<lora:a", "<lora:a", []),
        ("a <lora:a<b:1> c", "a  c", [Tag("lora", "a<b:1")]),
        ("<other:x <lora:a:1> <lora:b", "<other:x  <lora:b", [Tag("lora", "a:1")]),
        ("<lora:> <lora: >", "<lora:> <lora: >", []),
    ],
)
def test_known_tags_are_removed(text: str, bare: str, tags: list[Tag]):
    assert take_tags(text) == (bare, tags)

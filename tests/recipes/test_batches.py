"""The recipe's batches: what strewing words nobody taught may do to a caption, and what not."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from gouache.training.objective import chance
from recipes.mini.batches import NEUTRAL, Scenes

CAPTION = "a small red apple to the left of a cat on a blue background"


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes()


def test_strewn_words_move_the_others_along_and_some_captions_lose_what_only_points(scenes: Scenes) -> None:
    said = scenes.tokens([CAPTION] * 400, 40)
    strewn = scenes.strewn(said, chance(0, 0))
    words = scenes.tokenizer.encode(CAPTION)
    terse = [word for word in words if word not in scenes.pointing]
    assert 0 < len(terse) < len(words)
    seen: Counter[str] = Counter()
    for row in strewn.tolist():
        kept = [token for token in row[1 : row.index(scenes.tokenizer.end)] if token != NEUTRAL]
        assert kept in (words, terse)
        seen["terse" if kept == terse else "strewn" if NEUTRAL in row else "plain"] += 1
    assert abs(seen["plain"] - 200) < 50 and 15 < seen["terse"] < 80


def test_without_pointing_words_colours_stand_where_they_stood(scenes: Scenes) -> None:
    """So a colour right before a noun is told from one elsewhere."""
    encode = scenes.tokenizer.encode
    said = scenes.tokens(["a green rocket on a red background"], 40)
    green, rocket, red = (encode(word)[0] for word in ("green", "rocket", "red"))
    for number in range(200):
        row = scenes.strewn(said, chance(1, number))[0]
        apart = {word: int(torch.nonzero(row == word)[0]) for word in (green, rocket, red)}
        assert apart[green] < apart[rocket] < apart[red] - 1


def test_no_name_of_a_thing_is_lost_with_the_words_that_point(scenes: Scenes) -> None:
    for thing in scenes.things:
        for word in thing.words:
            assert any(token not in scenes.pointing for token in scenes.tokenizer.encode(word)), word

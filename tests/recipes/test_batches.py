"""The recipe's batches: what token augmentation may change in a caption, and what it keeps."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from gouache.training.objective import step_generator
from recipes.mini.batches import NEUTRAL, SceneData
from recipes.mini.rendering import Glyphs

CAPTION = "a small red apple to the left of a cat on a blue background"


@pytest.fixture(scope="module")
def data(glyphs: Glyphs) -> SceneData:
    return SceneData(glyphs=glyphs)


def test_neutral_tokens_shift_the_others_and_some_captions_lose_their_function_words(data: SceneData) -> None:
    tokens = data.tokens([CAPTION] * 400, 40)
    augmented = data.augment(tokens, step_generator(0, 0))
    words = data.tokenizer.encode(CAPTION)
    content = [word for word in words if word not in data.function_tokens]
    assert 0 < len(content) < len(words)
    seen: Counter[str] = Counter()
    for row in augmented.tolist():
        kept = [token for token in row[1 : row.index(data.tokenizer.end)] if token != NEUTRAL]
        assert kept in (words, content)
        seen["content" if kept == content else "shifted" if NEUTRAL in row else "unchanged"] += 1
    assert abs(seen["unchanged"] - 200) < 50 and 15 < seen["content"] < 80


def test_without_function_words_colours_keep_their_positions(data: SceneData) -> None:
    """So a colour directly before a noun differs from one elsewhere."""
    encode = data.tokenizer.encode
    tokens = data.tokens(["a green rocket on a red background"], 40)
    green, rocket, red = (encode(word)[0] for word in ("green", "rocket", "red"))
    for number in range(200):
        row = data.augment(tokens, step_generator(1, number))[0]
        index = {word: int(torch.nonzero(row == word)[0]) for word in (green, rocket, red)}
        assert index[green] < index[rocket] < index[red] - 1


def test_no_name_of_a_thing_consists_of_function_words(data: SceneData) -> None:
    for thing in data.things:
        for word in thing.words:
            assert any(token not in data.function_tokens for token in data.tokenizer.encode(word)), word

"""The prompts that the embedded model is evaluated with."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from gouache.errors import FileError, RequestError
from recipes.mini.dataset import TRAINING_SEED, sample
from recipes.mini.names import COLOURS
from recipes.mini.prompts import MORE_PROMPTS_FILE, PROMPTS_FILE, noun_pairs, read_prompts
from recipes.mini.scenes import TRAINING
from tests.recipes.reading import THINGS, readings, words_of


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return [sample(TRAINING_SEED, index, THINGS, TRAINING).caption for index in range(10_000)]


def test_there_are_sixty_prompts_ten_for_two_things_and_five_noun_pairs() -> None:
    prompts = read_prompts()

    assert len(prompts) == 60
    assert sum(len(prompt.things) == 2 for prompt in prompts) == 10
    assert len(noun_pairs(prompts)) == 5
    assert {prompt.colour for prompt in prompts} == {colour.name for colour in COLOURS}


def test_there_are_two_hundred_more_prompts_with_tints_and_sides() -> None:
    prompts = read_prompts(MORE_PROMPTS_FILE)

    assert len({prompt.text for prompt in prompts}) == 200
    assert sum(prompt.tint != "" for prompt in prompts) == 40
    assert sum(len(prompt.things) == 2 for prompt in prompts) == 40
    assert Counter(prompt.side for prompt in prompts if len(prompt.things) == 2) == {"beside": 20, "over": 12, "": 8}
    assert all(len(prompt.things) == 2 for prompt in prompts if prompt.side)


def test_a_prompt_names_the_things_and_colours_that_it_requests() -> None:
    for prompt in (*read_prompts(), *read_prompts(MORE_PROMPTS_FILE)):
        if prompt.tint:
            assert prompt.tint in words_of(prompt.text), prompt
        assert Counter(prompt.things) in readings(prompt.text.lower()), prompt
        assert prompt.colour in words_of(prompt.text), prompt


def test_at_most_two_percent_of_prompts_are_among_the_first_ten_thousand_training_captions(captions: list[str]) -> None:
    for path in (PROMPTS_FILE, MORE_PROMPTS_FILE):
        prompts = {prompt.text for prompt in read_prompts(path)}
        assert len(prompts.intersection(captions)) <= len(prompts) // 50


def test_paraphrases_have_words_that_no_training_caption_has(captions: list[str]) -> None:
    trained = {word for caption in captions for word in words_of(caption)}

    for prompt in read_prompts()[-20:]:
        assert set(words_of(prompt.text)) - trained, prompt


def test_a_prompt_for_an_unknown_thing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# comment\na zeppelin on red\tzeppelin\tred\n", encoding="utf-8")

    with pytest.raises(RequestError, match="line 2: 'zeppelin'"):
        read_prompts(path)


def test_an_unreadable_prompt_file_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"^.*none\.txt: cannot be read"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "picture.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="is not UTF-8"):
        read_prompts(tmp_path / "picture.txt")

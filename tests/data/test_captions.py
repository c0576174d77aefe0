"""Captions as kohya's scripts change them: examples worked out by hand from their documentation, and frequencies."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
import torch

from gouache.data.captions import caption, is_constant
from gouache.data.record import CaptionOptions, Record


def drawn(text: str | tuple[str, ...], count: int = 1, epoch: int = 0, step: int | None = None, **options) -> list[str]:
    """`count` captions in a row from one generator."""
    lines = (text,) if isinstance(text, str) else text
    record = Record(Path("a.png"), "a.png", lines, caption_options=CaptionOptions(**options))
    generator = torch.Generator().manual_seed(7)
    return [caption(record, epoch, generator, step, 100) for _ in range(count)]


def test_without_options_a_caption_is_its_first_line_unchanged():
    assert drawn(("a cat ,on  a mat{x|y}", "another")) == ["a cat ,on  a mat{x|y}"]
    assert drawn(()) == [""]


def test_the_same_generator_state_gives_the_same_caption():
    options = {"shuffle": True, "tag_dropout": 0.3, "dropout": 0.2, "wildcard": True}
    assert drawn("a, b, {c|d}, e", 20, **options) == drawn("a, b, {c|d}, e", 20, **options)
    assert len(set(drawn("a, b, {c|d}, e", 20, **options))) > 5


def test_shuffled_tags_have_every_order_about_equally_often():
    counts = Counter(drawn("a, b,c", 6000, shuffle=True))

    assert set(counts) == {", ".join(order) for order in permutations("abc")}
    assert all(abs(count - 1000) < 150 for count in counts.values())  # five standard deviations


def test_kept_tags_stay_in_front():
    found = set(drawn("sks, dog, c, d, e", 300, shuffle=True, keep_tokens=2))
    assert {text[:10] for text in found} == {"sks, dog, "} and len(found) == 6


def test_fences_keep_the_first_and_the_last_tags():
    text = "1girl, hatsune miku, vocaloid ||| stage, mic ||| best quality, rating: general"
    found = set(drawn(text, 100, shuffle=True, keep_tokens=1, keep_tokens_separator="|||"))
    front, back = "1girl, hatsune miku, vocaloid, ", ", best quality, rating: general"
    assert found == {f"{front}stage, mic{back}", f"{front}mic, stage{back}"}
    assert drawn("a ||| b, c", keep_tokens_separator="|||") == ["a, b, c"]
    assert drawn("b, c", keep_tokens_separator="|||") == ["b, c"]


def test_tag_dropout_leaves_out_that_share_of_the_tags_but_no_kept_one():
    found = drawn("keep, b, c, d", 4000, tag_dropout=0.25, keep_tokens=1)
    assert all(text.startswith("keep") for text in found)
    for tag in "bcd":
        assert sum(tag in text.split(", ") for text in found) / 4000 == pytest.approx(0.75, abs=0.035)


def test_dropout_empties_that_share_of_the_captions():
    found = Counter(drawn("a, b", 4000, dropout=0.1, prefix="p"))
    assert set(found) == {"", "p a, b"}
    assert found[""] / 4000 == pytest.approx(0.1, abs=0.025)
    assert set(drawn("a", 50, dropout=1.0)) == {""}


def test_captions_are_dropped_in_every_nth_epoch():
    assert [drawn("a", epoch=epoch, dropout_every_epochs=3)[0] for epoch in range(6)] == ["a", "a", "", "a", "a", ""]


def test_prefix_and_suffix_are_joined_with_a_space_and_are_part_of_the_first_and_last_tag():
    assert drawn("cat, dog", prefix="a", suffix="x") == ["a cat, dog x"]
    assert set(drawn("cat, dog", 50, prefix="a,", suffix=", x", shuffle=True, keep_tokens=3)) == {"a, cat, dog, x"}
    assert drawn("", prefix="a") == ["a"]


def test_wildcards_choose_lines_and_alternatives():
    found = Counter(drawn(("one {red|green|}", "two {{x}} {a}"), 3000, wildcard=True, prefix="p"))
    assert set(found) == {"p one red", "p one green", "p one ", "p two {x} a"}
    assert found["p two {x} a"] / 3000 == pytest.approx(0.5, abs=0.05)
    assert found["p one red"] / 3000 == pytest.approx(1 / 6, abs=0.04)


def test_the_secondary_separator_keeps_tags_together():
    found = set(drawn("1girl;;;red hair, stage", 50, shuffle=True, secondary_separator=";;;"))
    assert found == {"1girl,red hair, stage", "stage, 1girl,red hair"}


def test_another_separator_splits_there_alone():
    found = set(drawn("a, b. c", 50, shuffle=True, separator="."))
    assert found == {"a, b, c", "c, a, b"}


def test_the_number_of_tags_grows_during_the_warm_up():
    tags = "a, b, c, d, e"
    options = {"warmup_min": 1, "warmup_steps": 8}
    assert [len(drawn(tags, step=step, **options)[0].split(", ")) for step in range(0, 10, 2)] == [1, 2, 3, 4, 5]
    share = {"warmup_min": 2, "warmup_steps": 0.5}  # of 100 steps
    assert drawn(tags, step=0, **share) == ["a, b"] and drawn(tags, step=50, **share) == [tags]
    assert drawn(tags, step=None, **share) == [tags]


def test_constant_captions_are_those_without_random_changes():
    assert is_constant(CaptionOptions(prefix="a", dropout=0.5, keep_tokens=1))
    for options in ({"shuffle": True}, {"tag_dropout": 0.1}, {"wildcard": True}, {"warmup_steps": 5}):
        assert not is_constant(CaptionOptions(**options))

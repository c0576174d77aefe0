"""Filters and weights by scores, compared with the same in plain Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from gouache.data.dataset import DataSet
from gouache.data.record import Record
from gouache.data.scores import select, weigh
from gouache.errors import RequestError

SCORES = [{"aesthetic": 4.0, "punsafe": 0.5}, {"aesthetic": 6.0, "punsafe": 0.01}, {"aesthetic": 5.0}, {}]
DATASET = DataSet([Record(Path(f"{n}.png"), f"{n}.png", scores=each) for n, each in enumerate(SCORES)], ["before"])


def left(*conditions: str) -> list[str]:
    return [each.name[0] for each in select(DATASET, conditions).records]


def test_pictures_are_kept_where_all_conditions_hold():
    assert left("aesthetic>=5") == ["1", "2"] and left("aesthetic > 5") == ["1"] and left(" Aesthetic<5") == ["0"]
    assert left("punsafe<1e-1") == ["1"] and left("punsafe<=.5") == ["0", "1"] and left("aesthetic=5") == ["2"]
    assert left("aesthetic>=4.5", "punsafe<0.1") == ["1"] and left() == ["0", "1", "2", "3"]
    notes = select(DATASET, ["punsafe<0.1"]).notes
    assert notes == ["before", "punsafe<0.1: 3 of 4 pictures left out, 2 of them without this score"]


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (["aesthetic"], "is not a condition"),
        (["aesthetic>=5 or true"], "is not a condition"),
        (["aesthetic>=nan"], "is not a condition"),
        (["watermark<1"], "no picture has a score 'watermark'; their scores are aesthetic, punsafe"),
        (["aesthetic>9"], "no picture is left"),
    ],
)
def test_other_conditions_are_refused(conditions, message):
    with pytest.raises(RequestError, match=f"^filter: .*{message}"):
        select(DATASET, conditions)


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("aesthetic", [4 / 5, 6 / 5, 1, 1]),
        ("aesthetic^2", [16 / (77 / 3), 36 / (77 / 3), 25 / (77 / 3), 1]),
        ("1-punsafe", [0.5 / 0.745, 0.99 / 0.745, 1, 1]),
        ("punsafe^-1", [2 / 51, 100 / 51, 1, 1]),
    ],
)
def test_weights_are_in_proportion_and_keep_their_mean(by, expected):
    weights = [each.weight for each in weigh(DATASET, by).records]
    assert weights == pytest.approx(expected) and sum(weights) == pytest.approx(4)


def test_weights_multiply_those_there_are():
    twice = weigh(weigh(DATASET, "aesthetic"), "aesthetic")
    assert [each.weight for each in twice.records] == pytest.approx([16 / 25, 36 / 25, 1, 1])


@pytest.mark.parametrize("by", ["", "^2", "watermark", "1-aesthetic", "aesthetic^9999", "aesthetic^x"])
def test_other_weights_are_refused(by):
    with pytest.raises(RequestError, match=r"^weigh: "):
        weigh(DATASET, by)

"""Groups of copies, compared with all pairs one by one, and splits that keep copies together."""

from __future__ import annotations

import hashlib
import random
import time
from itertools import combinations
from pathlib import Path

import pytest
from PIL import ImageOps

from gouache.data.contents import Content, contents
from gouache.data.duplicates import NEAR, equal_files, groups
from gouache.data.record import Record
from gouache.data.split import split
from gouache.errors import RequestError
from gouache.training.run_settings import checked

from .pictures import photo


def content(number: int, look: int, mirrored: int | None = None) -> Content:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return Content(digest, (8, 8), look, random.Random(look).getrandbits(64) if mirrored is None else mirrored)


def made_up(count: int, copies: int, seed: int) -> list[Content]:
    """Random looks, and for the first ones chains of copies that differ in few bits from each other."""
    generator = random.Random(seed)
    found = [content(number, generator.getrandbits(64)) for number in range(count)]
    for number in range(copies):
        look = found[generator.randrange(len(found))].look
        for bit in generator.sample(range(64), generator.randrange(NEAR + 1)):
            look ^= 1 << bit
        found.append(content(count + number, look))
    generator.shuffle(found)
    return found


def records_of(found: list[Content], regularization: frozenset[int] = frozenset()) -> list[Record]:
    return [Record(Path(f"{n}.png"), f"{n}.png", regularization=n in regularization) for n in range(len(found))]


def components(found: list[Content]) -> set[frozenset[int]]:
    """By merging sets for every pair."""
    sets = [{row} for row in range(len(found))]
    for a, b in combinations(range(len(found)), 2):
        x, y = found[a], found[b]
        if (
            min((x.look ^ y.look).bit_count(), (x.look ^ y.mirrored).bit_count(), (x.mirrored ^ y.look).bit_count())
            <= NEAR
        ):
            joined = next(s for s in sets if a in s) | next(s for s in sets if b in s)
            sets = [s for s in sets if not s & joined] + [joined]
    return {frozenset(s) for s in sets}


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_the_connected_components(seed: int):
    found = made_up(40, 40, seed)
    assert {frozenset(group) for group in groups(found)} == components(found)
    assert sorted(row for group in groups(found) for row in group) == list(range(80))


def test_mirrored_and_smaller_copies_are_in_one_group(tmp_path: Path):
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    photo(1).save(paths[0])
    ImageOps.mirror(photo(1)).save(paths[1])
    photo(1).resize((80, 60)).save(paths[2])
    photo(2).save(paths[3])
    photo(1).save(paths[4])
    found = [each for each in contents(paths) if isinstance(each, Content)]

    assert groups(found) == [[0, 1, 2, 4], [3]] and equal_files(found) == [[0, 4]]


def test_many_pictures_are_grouped_quickly_also_if_all_look_alike():
    generator = random.Random(1)
    many = [content(number, generator.getrandbits(64)) for number in range(20_000)]
    flat = [content(number, 0, 0) for number in range(20_000)]
    for found, count in ((many, 20_000), (flat, 1)):
        started = time.perf_counter()
        assert len(groups(found)) == count
        assert time.perf_counter() - started < 30


def test_copies_are_on_one_side_for_1000_seeds():
    found = made_up(30, 30, 7)
    records = records_of(found)
    together = groups(found)
    sides = set[tuple[str, ...]]()
    for seed in range(1000):
        train, held = split(records, found, 0.2, seed)
        names = {each.name for each in held}
        assert not names & {each.name for each in train} and len(train) + len(held) == 60
        assert 1 <= len(held) <= 12
        for group in together:
            assert len({records[row].name in names for row in group}) == 1
        sides.add(tuple(sorted(names)))
    assert len(sides) > 500  # the seed matters


def test_the_split_does_not_depend_on_names_or_order():
    found = made_up(30, 10, 3)
    expected = {found[int(each.name[:-4])].sha256 for each in split(records_of(found), found, 8, 5)[1]}
    shuffled = random.Random(0).sample(found, len(found))
    again = {shuffled[int(each.name[:-4])].sha256 for each in split(records_of(shuffled), shuffled, 8, 5)[1]}
    assert again == expected and len(expected) == 8


def test_more_pictures_leave_most_of_the_held_out_ones_held_out():
    found = [content(number, random.Random(number).getrandbits(64)) for number in range(200)]
    few = {found[int(each.name[:-4])].sha256 for each in split(records_of(found[:180]), found[:180], 0.1, 1)[1]}
    more = {found[int(each.name[:-4])].sha256 for each in split(records_of(found), found, 0.1, 1)[1]}
    assert len(few & more) >= len(few) / 2


def test_the_number_is_exact_where_copies_allow_it():
    found = [content(number, random.Random(number).getrandbits(64)) for number in range(20)]
    records = records_of(found)
    for holdout, count in ((0, 0), (0.0, 0), (1, 1), (5, 5), (0.25, 5), (0.01, 1), (0.99, 19), (19, 19)):
        assert len(split(records, found, holdout, 0)[1]) == count
    train, held = split(records, found, 5, 0)
    assert [each.name for each in train + held] != [each.name for each in records]
    assert train == [each for each in records if each not in held]  # in the order of the records


def test_regularization_pictures_and_their_copies_stay():
    found = [content(0, 0), content(1, 1), *(content(n, random.Random(n).getrandbits(64)) for n in range(2, 8))]
    for seed in range(50):
        _, held = split(records_of(found, frozenset({0, 2})), found, 3, seed)
        assert not {each.name for each in held} & {"0.png", "1.png", "2.png"}


def test_a_share_is_one_of_the_pictures_that_are_not_of_the_class():
    found = [content(number, random.Random(number).getrandbits(64)) for number in range(55)]
    for subject, share, count in ((5, 0.1, 1), (5, 0.99, 4), (20, 0.25, 5), (2, 0.5, 1)):
        records = records_of(found, frozenset(range(subject, 55)))
        train, held = split(records, found, share, 3)
        assert len(held) == count and not any(each.regularization for each in held)
        assert sum(not each.regularization for each in train) == subject - count


@pytest.mark.parametrize("share", [1.0, 2.0])
def test_a_share_of_all_is_refused(share: float):
    found = [content(number, random.Random(number).getrandbits(64)) for number in range(5)]
    with pytest.raises(RequestError, match=r"holdout: is [12]\.0; expected a share below 1"):
        split(records_of(found), found, share, 0)
    with pytest.raises(RequestError, match=r"validation\.share: .*less than 1"):
        checked({"train": {"steps": 9, "batch": 1, "learning_rate": 1e-4}, "validation": {"share": share}})


def test_a_group_larger_than_wanted_is_held_out_whole():
    found = [content(0, 0), content(1, 1), content(2, 2**63 - 1), content(3, 2**63 - 2), content(4, 2**63 - 4)]
    _, held = split(records_of(found), found, 1, 0)
    assert [each.name for each in held] == ["0.png", "1.png"]


def test_what_cannot_be_split_is_refused():
    copies = [content(0, 0), content(1, 1)]
    for found, holdout in ((copies, 1), (copies, 2), (copies, -1), (copies, 1.5), (copies, float("nan")), ([], 1)):
        with pytest.raises(RequestError, match=r"^holdout: "):
            split(records_of(found), found, holdout, 0)
    with pytest.raises(RequestError, match="of the class"):
        other = [content(0, 0), content(1, 2**64 - 1)]
        split(records_of(other, frozenset({0, 1})), other, 1, 0)


def test_real_copies_never_leak(tmp_path: Path):
    paths = list[Path]()
    for seed in range(8):
        for name, picture in (
            ("a", photo(seed)),
            ("b", ImageOps.mirror(photo(seed))),
            ("c", photo(seed).resize((96, 72))),
        ):
            paths.append(tmp_path / f"{seed}{name}.jpg")
            picture.save(paths[-1], quality=80)
    found = [each for each in contents(paths) if isinstance(each, Content)]
    records = [Record(path, path.name) for path in paths]
    for seed in range(100):
        train, held = split(records, found, 0.25, seed)
        assert {each.name[0] for each in train}.isdisjoint(each.name[0] for each in held) and len(held) == 6

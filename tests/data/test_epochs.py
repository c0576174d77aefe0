"""The order of examples: nothing is lost, nothing is mixed, and a batch depends on its number alone."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gouache.data.epochs import Plan, balance


def seeded(seed: int):
    return lambda epoch: torch.Generator().manual_seed(1000 * seed + epoch)


def plan(sizes: list, repeats: list[int], batch: int, seed: int = 0) -> Plan:
    return Plan(sizes, repeats, batch, seeded(seed))


def test_seven_pictures_of_five_shapes_are_each_seen_repeats_times_per_epoch():
    shapes = ["a", "b", "b", "c", "d", "e", "e"]
    repeats = [1, 2, 3, 10, 1, 5, 4]
    order = plan(shapes, repeats, batch=4)

    for epoch in range(5):
        batches = [order.batch(epoch * len(order) + index) for index in range(len(order))]

        assert {number for number, _ in batches} == {epoch}
        assert Counter(row for _, rows in batches for row in rows) == Counter(dict(enumerate(repeats)))
        assert all(len({shapes[row] for row in rows}) == 1 and len(rows) <= 4 for _, rows in batches)
    # a: 1, b: 5, c: 10, d: 1, e: 9
    assert len(order) == 1 + 2 + 3 + 1 + 3
    assert order.examples == sum(repeats)


@settings(max_examples=50)
@given(rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=40), batch=st.integers(1, 9))
def test_every_row_is_seen_repeats_times_whatever_the_sizes(rows: list[tuple[int, int]], batch: int):
    sizes, repeats = [size for size, _ in rows], [count for _, count in rows]
    order = plan(sizes, repeats, batch)

    seen = [order.batch(number)[1] for number in range(len(order), 2 * len(order))]

    assert Counter(row for each in seen for row in each) == Counter(dict(enumerate(repeats)))
    assert all(len({sizes[row] for row in each}) == 1 for each in seen)
    per_size = Counter(size for size, count in rows for _ in range(count))
    assert len(order) == sum(-(-count // batch) for count in per_size.values())


def test_a_batch_depends_on_its_number_alone():
    sizes, repeats = [number % 3 for number in range(20)], [3] * 20
    order = plan(sizes, repeats, 4)
    forwards = [order.batch(number) for number in range(60)]

    backwards = [plan(sizes, repeats, 4).batch(number) for number in reversed(range(60))]

    assert forwards == backwards[::-1]
    assert forwards == [order.batch(number) for number in range(60)]


@settings(max_examples=100)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=20).filter(
        lambda rows: any(count for _, count in rows)
    ),
    steps=st.lists(st.tuples(st.integers(0, 25), st.integers(1, 6)), max_size=4),
)
def test_with_another_batch_size_the_epoch_is_finished_and_the_past_is_kept(
    rows: list[tuple[int, int]], steps: list[tuple[int, int]]
):
    sizes, repeats = [size for size, _ in rows], [count for _, count in rows]
    changes, number = [], 0
    for skip, batch in steps:
        number += skip
        changes.append((number, batch))
    order = Plan(sizes, repeats, 3, seeded(0), changes)
    before = Plan(sizes, repeats, 3, seeded(0), changes[:-1])

    seen = [order.batch(each) for each in range(number + 2 * len(order) + 20)]

    assert seen[:number] == [before.batch(each) for each in range(number)]
    epochs = [epoch for epoch, _ in seen]
    assert epochs == sorted(epochs) and set(epochs) == set(range(epochs[-1] + 1))
    for epoch in range(epochs[-1]):
        counts = Counter(row for each, members in seen if each == epoch for row in members)
        assert counts == Counter({row: count for row, count in enumerate(repeats) if count})
    for each, (_, members) in enumerate(seen):
        full = next((batch for first, batch in reversed(changes) if first <= each), 3)
        assert order.full(each) == full and 0 < len(members) <= full
        assert len({sizes[row] for row in members}) == 1


def test_epochs_and_seeds_have_different_orders():
    first, other = plan([0] * 50, [1] * 50, 10), plan([0] * 50, [1] * 50, 10, seed=1)
    epochs = [[first.batch(epoch * 5 + index)[1] for index in range(5)] for epoch in range(3)]

    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [other.batch(index)[1] for index in range(5)]


def test_batches_of_different_sizes_are_in_random_order():
    order = plan([0] * 50 + [1] * 50, [1] * 100, 10)

    firsts = Counter(order.batch(epoch * len(order))[1][0] < 50 for epoch in range(100))

    assert 25 < firsts[True] < 75


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=30))
def test_class_pictures_are_seen_as_often_as_the_others(rows: list[tuple[int, bool]]):
    repeats, kinds = [count for count, _ in rows], [kind for _, kind in rows]

    seen = Counter[int]()
    for epoch in range(5):
        balanced = balance(repeats, kinds, epoch)

        others = [count for count, kind in zip(balanced, kinds) if not kind]
        classes = [count for count, kind in zip(balanced, kinds) if kind]
        assert others == [count for count, kind in rows if not kind]
        if others and classes:
            assert sum(classes) == sum(others)
            assert max(classes) - min(classes) <= 1
            seen.update({row: count for row, count in enumerate(balanced) if kinds[row]})
            # Over all epochs too: none is left out for longer than needed.
            assert max(seen.values()) - min(seen[row] for row, kind in enumerate(kinds) if kind) <= 1
        else:
            assert balanced == repeats


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.booleans()), min_size=2, max_size=25),
    batch=st.integers(1, 4),
    change=st.integers(0, 30),
)
@settings(max_examples=50)
def test_all_class_pictures_are_used_in_turn_and_a_batch_depends_on_its_number_alone(
    rows: list[tuple[int, int, bool]], batch: int, change: int
):
    sizes, repeats, kinds = ([row[column] for row in rows] for column in range(3))

    def made(*changes: tuple[int, int]) -> Plan:
        return Plan(sizes, repeats, batch, seeded(0), changes, kinds)

    order, epochs = made(), made().cycle
    found = [order.batch(number) for number in range(order.total(epochs))]

    assert [epoch for epoch, _ in found] == sorted(epoch for epoch, _ in found) and found[-1][0] == epochs - 1
    assert order.batch(len(found))[0] == epochs
    assert all(len({sizes[row] for row in batch_rows}) == 1 for _, batch_rows in found)
    assert {row for _, batch_rows in found for row in batch_rows} == set(range(len(rows)))
    for epoch in range(epochs):
        counts = Counter(row for number, batch_rows in found if number == epoch for row in batch_rows)
        assert all(counts[row] == repeats[row] for row in range(len(rows)) if not kinds[row])
        assert counts.total() == order.examples
        if any(kinds) and not all(kinds):
            assert 2 * sum(counts[row] for row in range(len(rows)) if kinds[row]) == counts.total()
    assert [made().batch(number) for number in reversed(range(len(found)))] == found[::-1]

    # With another batch size from a number on, what is before it is unchanged and each epoch has the same rows.
    changed = made((change, 5))
    again = [changed.batch(number) for number in range(changed.total(epochs) + change)]
    assert again[:change] == [order.batch(number) for number in range(change)]
    for epoch in range(again[-1][0]):  # the last may be incomplete
        assert Counter(row for number, batch_rows in again if number == epoch for row in batch_rows) == Counter(
            row for row, count in enumerate(balance(repeats, kinds, epoch)) for _ in range(count)
        )

"""Batches of tar shards: equal to those of the unpacked folder, local, a function of their number."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gouache.data.epochs import Plan
from gouache.data.folders import read
from gouache.data.members import Member
from gouache.data.record import PictureOptions
from gouache.data.subset import Subset
from gouache.errors import RequestError, TrainingError
from gouache.training.batch import Batch

from ..data.tars import damaged, encoded, pack, write
from .data_sets import BUCKETS, Encoders, batches, data_set, shuffled_caption

VARIED = PictureOptions(flip=True, random_crop=True, color=True)
FLIPPED = PictureOptions(flip=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures of five shapes with captions."""
    path = tmp_path / "unpacked"
    path.mkdir()
    for record in data_set(path):
        (path / record.name).with_suffix(".txt").write_text(record.captions[0])
    return path


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    return pack(folder, tmp_path / "shards", (3, 4))


def equal(one: Batch, two: Batch) -> bool:
    tensors = [
        (each.latents, each.weights, each.mask, each.conditioning and each.conditioning.context) for each in (one, two)
    ]
    texts = [(each.captions, each.sizes, [name.rpartition("/")[2] for name in each.names]) for each in (one, two)]
    return texts[0] == texts[1] and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(*tensors)
    )


@pytest.mark.parametrize(("stream", "options"), [(False, VARIED), (True, FLIPPED)])
def test_batches_are_those_of_the_unpacked_folder(folder: Path, shards: Path, stream: bool, options: PictureOptions):
    subset = Subset(trigger="sks", repeats=2, picture_options=options)
    found = [read(folder, subset).records, read(shards, subset, stream=stream).records]
    same: dict[str, Any] = {
        "caption": shuffled_caption,
        "batch": 3,
        "buckets": (BUCKETS, replace(BUCKETS, resolution=(32, 32))),
    }
    with batches(found[0], None, **same) as plain, batches(found[1], None, workers=2, window=2, **same) as packed:
        assert len(plain) == len(packed) and list(plain.columns.sizes) == list(packed.columns.sizes)
        assert all(equal(plain(number), packed(number)) for number in range(2 * len(plain)))
        assert (plain.identity == packed.identity) is not stream


def test_a_batch_of_a_stream_depends_on_its_number_alone(shards: Path, tmp_path: Path):
    subset = Subset(picture_options=VARIED)
    with batches(read(shards, subset, stream=True).records, None, batch=2, window=1, workers=2) as source:
        expected = [source(number) for number in range(3 * len(source))]
        identity = source.identity
    moved = tmp_path / "elsewhere"
    shutil.copytree(shards, moved)  # other paths and times
    for first in (5, 1, 9):
        with batches(read(moved, subset, stream=True).records, None, batch=2, window=1, workers=0) as source:
            assert equal(source(first), expected[first]) and source.identity == identity


def test_nothing_is_decoded_before_it_is_needed_and_caches_work(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    records = read(shards, stream=True).records
    monkeypatch.setattr("gouache.data.pictures.read_bytes", None)
    batches(records, tmp_path / "cache").close()
    monkeypatch.undo()
    encoders, cached = Encoders(), list[Batch]()
    for _ in range(2):
        with batches(records, tmp_path / "cache", encoders) as source:
            source.prepare(range(len(source)))
            cached = [source(number) for number in range(len(source))]
    assert len(encoders.pictures) == 7
    with batches(records, None) as source:
        assert all(equal(source(number), each) for number, each in enumerate(cached))


def test_a_damaged_picture_of_a_stream_counts_nothing(tmp_path: Path):
    good = {f"{n}.png": encoded(n, (64, 64)) for n in range(4)}
    write(tmp_path / "a.tar", {**good, "2.png": damaged(good["2.png"])})
    records, lines = read(tmp_path, stream=True).records, list[str]()
    for workers in (0, 2):
        with batches(records, None, on_damaged=lines.append, workers=workers) as source:
            batch, _ = source(0), source(1)
        assert batch.weights is not None and batch.latents.isfinite().all()
        weights = dict(zip(batch.names, batch.weights.tolist()))
        assert weights == {"a.tar/0.png": 1, "a.tar/1.png": 1, "a.tar/2.png": 0, "a.tar/3.png": 1}
    assert len(lines) == 2 and all("a.tar/2.png" in line and "counts nothing" in line for line in lines)
    with batches(records, None) as source, pytest.raises(RequestError, match=r"a\.tar/2\.png"):
        source(0)
    with pytest.raises(RequestError, match=r"a\.tar/2\.png"):
        batches(read(tmp_path).records, None)


def test_a_shard_that_is_replaced_while_it_is_used_is_found(tmp_path: Path):
    write(tmp_path / "a.tar", {"0.png": encoded(0, (64, 64))})
    with batches(read(tmp_path, stream=True).records, None, on_damaged=[].append) as source:
        source(0)
        write(tmp_path / "a.tar", {"0.png": encoded(1, (64, 64)) + bytes(4000)})
        with pytest.raises(TrainingError, match="was changed while it was used"):
            source(1)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(-1, 7)), min_size=1, max_size=80),
    batch=st.integers(1, 5),
    window=st.integers(1, 4),
)
def test_an_epoch_is_a_permutation_of_all_rows_and_goes_through_the_shards_window_by_window(
    rows: list[tuple[int, int, int]], batch: int, window: int
):
    sizes, repeats, shards = (list(each) for each in zip(*rows))

    def generator(epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(epoch)

    plan = Plan(sizes, repeats, batch, generator, shards=shards, window=window)
    plain = Plan(sizes, repeats, batch, generator)
    assert len(plan) == len(plain)
    for epoch in range(2):
        order = [plan.batch(number) for number in range(epoch * len(plan), (epoch + 1) * len(plan))]
        assert all(found == epoch and len({sizes[row] for row in part}) == 1 for found, part in order)
        assert Counter(row for _, part in order for row in part) == Counter(dict(enumerate(repeats))) + Counter()
        for size in set(sizes):  # of each size, only less than a batch is left for the next window
            seen = [shards[row] for _, part in order for row in part if sizes[row] == size and shards[row] >= 0]
            first, last = ({shard: place for place, shard in each} for each in (
                reversed(list(enumerate(seen))), enumerate(seen)))  # fmt: skip
            for place in range(len(seen)):
                assert sum(first[shard] <= place <= last[shard] for shard in first) < window + batch


def test_orders_within_windows_differ_by_epoch_and_are_random():
    shards = [row // 50 for row in range(400)]
    plan = Plan([0] * 400, [1] * 400, 4, lambda epoch: torch.Generator().manual_seed(epoch), shards=shards, window=2)
    epochs = [[row for n in range(100) for row in plan.batch(epoch * 100 + n)[1]] for epoch in range(3)]
    assert len({tuple(each) for each in epochs}) == 3
    for order in epochs:
        windows = [sorted(order[first : first + 100]) for first in range(0, 400, 100)]
        assert sorted(row for rows in windows for row in rows) == list(range(400))
        assert all(len({shards[row] for row in rows}) == 2 for rows in windows)
        assert order[:100] != windows[0]


def test_members_of_shards_with_equal_names_are_different_shards(tmp_path: Path):
    for name in ("x", "y"):
        write(tmp_path / name / "0.tar", {"0.png": encoded(len(name), (64, 64))})
    with batches(read(tmp_path).records, None) as source:
        assert list(source.columns.shards) == [0, 1]
        assert all(isinstance(row.record.path, Member) for row in source.rows)

"""Which checkpoints are saved and kept, early stopping, requests to save, and disks without space."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections import namedtuple

import pytest
import torch

from gouache.errors import TrainingError
from gouache.training import state
from gouache.training.interrupt import SAVE_NOW
from gouache.training.loop import train
from gouache.training.position import Position, position_fault, read_position
from gouache.training.retention import ends_epochs, protected

from .toys import points, regression, settings


def steps_in(folder) -> list[int]:
    return [state.number(path) for path in state.checkpoints(folder)]


def scored(*losses: float):
    """A validation with these losses in turn; for runs without averages, which validate once."""
    left = iter(losses)
    return lambda: {"loss": next(left)}


def run(folder, *losses: float, seed: int = 0, **values):
    chosen = settings(**{"steps": len(losses) or 6, "validate_steps": 1, "ema_decay": 0, "keep": 1, **values})
    return train(regression(seed), points, chosen, folder, validate=scored(*losses) if losses else None)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"save_steps": 2}, [10]),
        ({"save_steps": 2, "keep": 3}, [6, 8, 10]),
        ({"save_steps": 3, "keep": 9}, [3, 6, 9, 10]),
        ({"keep_every": 4}, [4, 8, 10]),
        ({"keep_every": 4, "save_steps": 1, "keep": 2}, [4, 8, 9, 10]),
        ({"save_seconds": 1e-9, "keep": 3}, [8, 9, 10]),
    ],
)
def test_the_last_ones_and_those_of_an_interval_are_kept(tmp_path, values, kept):
    run(tmp_path, **{"steps": 10, **values})

    assert steps_in(tmp_path) == kept


def test_the_best_are_kept_at_the_steps_of_their_validation(tmp_path):
    result = run(tmp_path, 5.0, 2.0, float("nan"), 3.0, 1.0, 4.0, 6.0, keep_best=2)

    assert steps_in(tmp_path) == [2, 5, 7] and result.best == (5, 2)
    best = state.newest(tmp_path)
    assert best is not None and best.values["ranking"] == [[1.0, 5], [2.0, 2]]


def test_a_checkpoint_of_the_best_step_has_the_weights_of_that_step(tmp_path):
    run(tmp_path / "run", 3.0, 1.0, 2.0, 2.0)
    expected = run(tmp_path / "short", steps=2)

    shutil.rmtree(tmp_path / "run" / "step-00000004")
    found = state.newest(tmp_path / "run")

    assert found is not None and found.step == 2
    torch.testing.assert_close(dict(found.tensors["weights"]), dict(expected.last), rtol=0, atol=0)


def test_no_best_is_kept_if_none_is_wanted(tmp_path):
    run(tmp_path, 5.0, 2.0, 3.0, keep_best=0)

    assert steps_in(tmp_path) == [3]


def test_the_ranking_goes_on_after_a_resume(tmp_path):
    run(tmp_path, 3.0, 1.0)
    run(tmp_path, 2.0, 0.5, 0.7, seed=9, steps=5)

    assert steps_in(tmp_path) == [4, 5]
    run(tmp_path, 0.6, 0.9, seed=9, steps=7)
    assert steps_in(tmp_path) == [4, 7]


def test_what_is_protected_follows_the_ranking_and_the_interval():
    position = Position(step=9, best=[(0.1, 5), (0.2, 3), (0.3, 8)])

    assert protected([1, 2, 3, 5, 6, 8], position, settings(keep_best=2, keep_every=3)) == {3, 5, 6}
    assert protected([1, 5], position, settings(keep_best=0)) == set()


def test_a_checkpoint_is_saved_at_the_end_of_epochs(tmp_path):
    chosen = settings(steps=10, save_epochs=1, keep=9)

    train(regression(), points, chosen, tmp_path / "one", epoch_batches=4)
    train(
        regression(), points, settings(steps=10, save_epochs=2, keep=9, accumulate=3), tmp_path / "two", epoch_batches=4
    )

    assert steps_in(tmp_path / "one") == [4, 8, 10]
    assert steps_in(tmp_path / "two") == [3, 6, 8, 10]  # the steps that pass batches 8, 16 and 24
    assert not ends_epochs(Position(4, 4), settings(save_epochs=1), 0)


@pytest.mark.parametrize(
    ("losses", "values", "ended", "reason"),
    [
        ([5, 4, 4, 4, 4, 4], {"patience": 2}, 4, "patience"),
        ([5, 4, 3, 2, 1, 0], {"patience": 2}, 6, "steps"),
        ([5, 4.9, 4.8, 4.7, 4.6, 4.5], {"patience": 3, "minimum_change": 0.15}, 6, "steps"),
        ([5, 4.99, 4.98, 4.97, 4.9, 4.5], {"patience": 3, "minimum_change": 0.15}, 4, "patience"),
        ([5, 6, 7, 8, 9, 9], {"patience": 0}, 6, "steps"),
        ([5, float("nan"), float("nan"), 1, 1, 1], {"patience": 2}, 3, "patience"),
    ],
)
def test_a_run_ends_when_validation_does_not_improve(tmp_path, losses, values, ended, reason):
    result = run(tmp_path, *losses, **values)

    assert (result.step, result.reason, result.finished) == (ended, reason, True)
    assert max(steps_in(tmp_path)) == ended


def test_patience_is_counted_across_a_resume_and_a_run_without_any_left_does_nothing(tmp_path):
    run(tmp_path, 5.0, 1.0, 2.0, patience=3)
    run(tmp_path, 2.0, 2.0, 2.0, 2.0, seed=9, steps=9, patience=3)
    assert max(steps_in(tmp_path)) == 5

    again = run(tmp_path, seed=9, steps=9, patience=3)
    more = run(tmp_path, 2.0, 2.0, 2.0, seed=9, steps=9, patience=5)

    assert (again.step, again.reason) == (5, "patience")
    assert (more.step, more.reason) == (7, "patience")


def test_a_position_is_read_as_it_was_written_and_old_ones_have_their_defaults():
    position = Position(5, 10, [2], [(0.5, 4), (0.7, 2)], 0.4, 3)

    assert read_position(json.loads(json.dumps(position.values())), accumulate=7) == position
    assert read_position({"step": 5, "best": None}, accumulate=2) == Position(5, 10)
    assert read_position({"step": 5, "best": 0.3}, accumulate=1).lowest == 0.3


@pytest.mark.parametrize(
    "wrong",
    [{"number": "5"}, {"skipped": [1.5]}, {"ranking": [[1.0]]}, {"lowest": "a"}, {"waiting": None}, {"best": "x"}],
)
def test_a_position_that_cannot_be_read_is_named(wrong):
    assert position_fault({**Position(3, 3).values(), **wrong}) == next(iter(wrong))
    assert position_fault(Position(3, 3).values()) == ""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="signals of POSIX")
@pytest.mark.parametrize("by", ["file", "signal"])
def test_a_checkpoint_is_saved_on_demand_and_the_run_goes_on(tmp_path, by):
    seen: list[list[int]] = []

    def batches(number: int):
        seen.append(steps_in(tmp_path))
        if number == 2:
            if by == "file":
                (tmp_path / SAVE_NOW).touch()
            else:
                os.kill(os.getpid(), signal.SIGUSR1)
        return points(number)

    result = train(regression(), batches, settings(), tmp_path)

    assert seen == [[], [], [], [3], [3], [3]]
    assert result.finished and not (tmp_path / SAVE_NOW).exists()


Usage = namedtuple("Usage", "total used free")


def with_free(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, free))


def test_a_run_does_not_start_on_a_disk_without_space_for_a_checkpoint(tmp_path, monkeypatch):
    with_free(monkeypatch, 1_000_000)

    with pytest.raises(TrainingError, match=r"a checkpoint needs .*, but 1\S* MB are free") as caught:
        train(regression(), lambda number: pytest.fail("a batch was requested"), settings(), tmp_path)

    assert "\n" not in str(caught.value)


def test_a_finished_run_needs_no_space(tmp_path, monkeypatch):
    train(regression(), points, settings(), tmp_path)
    with_free(monkeypatch, 0)

    assert train(regression(), points, settings(), tmp_path).finished


def test_a_disk_that_fills_up_stops_the_run_in_one_line_with_the_newest_checkpoint_whole(tmp_path, monkeypatch):
    def batches(number: int):
        if number == 4:
            with_free(monkeypatch, 1_000_000)
        return points(number)

    with pytest.raises(TrainingError, match=r"a checkpoint needs .* free some space") as caught:
        train(regression(), batches, settings(save_steps=2, keep=1), tmp_path / "run")

    assert "\n" not in str(caught.value)
    assert_resumes_from_4(tmp_path, monkeypatch)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
@pytest.mark.parametrize("limit", [1, 100, 700])
def test_a_write_that_fails_stops_the_run_in_one_line_with_the_newest_checkpoint_whole(tmp_path, monkeypatch, limit):
    import resource

    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def batches(number: int):
        if number == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        return points(number)

    try:
        with pytest.raises(
            TrainingError, match=r"step-00000006: cannot be written: .*older checkpoints are kept"
        ) as caught:
            train(regression(), batches, settings(save_steps=2, keep=1, log_steps=99, steps=7), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)

    assert "\n" not in str(caught.value) and "part" not in str(caught.value)
    assert_resumes_from_4(tmp_path, monkeypatch, steps=7)


def assert_resumes_from_4(tmp_path, monkeypatch, steps: int = 6) -> None:
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "run").glob("step*")) == ["step-00000004"]
    whole = train(regression(), points, settings(steps=steps), tmp_path / "whole")
    resumed = train(regression(9), points, settings(steps=steps), tmp_path / "run")
    torch.testing.assert_close(dict(resumed.last), dict(whole.last), rtol=0, atol=0)

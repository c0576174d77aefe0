"""A run that is killed or stopped at any moment resumes exactly: tests with processes and real signals."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gouache.errors import TrainingError
from gouache.training import interrupt, state
from tests.marks import usual

from . import runs
from .toys import train_small_autoencoder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

STEPS = 40
KILLS = 5  # of each run; the long test kills 50 times
EVERY_STEP = 1e-9
ALIKE = ("master", "schedule-free")  # to other runs


@pytest.fixture(scope="module")
def forked():
    """Starts a function in a process of its own, forked from one that has already imported torch."""
    context = multiprocessing.get_context("forkserver")
    # The first step of an optimizer imports torch._dynamo, which takes seconds.
    context.set_forkserver_preload(["torch._dynamo", "tests.training.toys", "tests.training.runs"])
    started = []

    def start(function, *arguments):
        child = context.Process(target=function, args=arguments)
        child.start()
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.join()


@pytest.fixture
def start(forked):
    def go(folder: Path, steps: int, save_seconds: float, hang_at: int = -1):
        return forked(train_small_autoencoder, folder, steps, save_seconds, hang_at)

    return go


def newest_number(folder: Path) -> int:
    return max((state.number(path) for path in state.checkpoints(folder)), default=0)


def wait_until(condition, child, seconds: float = 60) -> None:
    """Until `condition()` is true or the child has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and child.exitcode is None:
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.002)


def kill_often(forked, name: str, folder: Path, steps: int, kills: int, seed: int) -> int:
    """Start the run and kill it, again and again, at random moments; returns how often it was really killed.

    A third of the kills come from within, at a random operation on the disk, most of them in the middle of a save.
    """
    rng = random.Random(seed)
    killed = reached = 0
    for kill in range(kills):
        save_seconds = rng.choice([EVERY_STEP, EVERY_STEP, 0.03])
        if kill % 3 == 0:
            child = forked(die_at_operation, rng.randrange(1, 60), name, folder, steps, save_seconds)
            child.join(60)
        else:
            child = forked(runs.go, name, folder, steps, save_seconds)
            if kill % 3 == 1:  # otherwise it is killed while it starts
                wait_until(lambda before=reached: newest_number(folder) > before, child)
            child.join(rng.uniform(0, 0.06))
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        killed += child.exitcode == -signal.SIGKILL
        found = state.newest(folder)
        assert (found.step if found else 0) >= reached, "work was lost that had been saved"
        reached = found.step if found else 0
    return killed


def die_at_operation(count: int, *arguments) -> None:
    """The run, killed at operation number `count` that changes the disk."""
    left = count

    def counted(real):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("mkdir", "fsync", "replace", "rename", "link", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    runs.go(*arguments)


def assert_ended_equal(found_folder: Path, expected_folder: Path) -> None:
    """The last and the best checkpoints and the logs of both runs are the same, bit for bit."""
    last = state.newest(expected_folder)
    assert last is not None
    for step in {last.step, *(step for _, step in last.values["ranking"])}:
        expected, found = (state.read(folder / f"step-{step:08d}") for folder in (expected_folder, found_folder))
        assert found.tensors.keys() == expected.tensors.keys()
        for file, tensors in expected.tensors.items():
            assert found.tensors[file].keys() == tensors.keys()
            unequal = [name for name, tensor in tensors.items() if not torch.equal(found.tensors[file][name], tensor)]
            assert not unequal, (step, file)
        for name in ("step", "number", "best", "ranking", "lowest", "waiting", "skipped", "ema_updates", "optimizer"):
            assert found.values[name] == expected.values[name], (step, name)
    assert (found_folder / "log.jsonl").read_text() == (expected_folder / "log.jsonl").read_text()
    assert not [path.name for path in found_folder.iterdir() if path.suffix in (".part", ".tmp", ".bad")]


def check_kills(forked, tmp_path: Path, name: str, steps: int, kills: int, seed: int) -> int:
    uninterrupted, folder = tmp_path / "uninterrupted", tmp_path / "killed"
    whole = forked(runs.go, name, uninterrupted, steps, 1e9)
    killed = kill_often(forked, name, folder, steps, kills, seed)
    last = forked(runs.go, name, folder, steps, EVERY_STEP)
    last.join()
    whole.join()

    assert (last.exitcode, whole.exitcode) == (0, 0)
    assert_ended_equal(folder, uninterrupted)
    return killed


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in ALIKE else name for name in runs.NAMES]
)
def test_a_run_killed_at_random_moments_ends_bit_equal_to_an_uninterrupted_one(forked, tmp_path, name):
    killed = check_kills(forked, tmp_path, name, STEPS, KILLS, seed=11)

    assert killed >= KILLS // 2


@pytest.mark.parametrize("kind", usual(("embedding", "hypernetwork", "pivotal"), ("embedding",)))
def test_what_is_trained_on_a_model_ends_bit_equal_after_kills(forked, tmp_path, narrow, kind):
    killed = check_kills(forked, tmp_path, f"{kind}:{narrow('sd1').file}", steps=10, kills=3, seed=5)

    assert killed >= 2


@pytest.mark.full
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", runs.NAMES)
def test_a_long_run_killed_fifty_times_ends_bit_equal(forked, tmp_path, name, seed):
    assert check_kills(forked, tmp_path, name, steps=400, kills=50, seed=seed) >= 40


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_stop_signal_finishes_the_step_and_saves(start, tmp_path, number):
    folder = tmp_path / "run"
    child = start(folder, 100_000, save_seconds=1e9)
    wait_until(lambda: (folder / "log.jsonl").exists() and len((folder / "log.jsonl").read_text()) > 200, child)

    os.kill(child.pid, number)
    child.join(30)

    assert child.exitcode == 0
    result = json.loads((tmp_path / "result.json").read_text())
    logged = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert result == {"step": max(logged), "finished": False}
    assert newest_number(folder) == max(logged)


def test_a_second_signal_stops_at_once_and_the_last_checkpoint_remains(start, tmp_path):
    folder = tmp_path / "run"
    child = start(folder, 100, EVERY_STEP, hang_at=6)  # two batches per step: the fourth step does not end
    wait_until(lambda: newest_number(folder) == 3, child)
    time.sleep(0.1)

    os.kill(child.pid, signal.SIGINT)
    child.join(0.3)
    still_running = child.exitcode is None
    os.kill(child.pid, signal.SIGINT)
    child.join(30)

    assert still_running and child.exitcode not in (None, 0)
    found = state.newest(folder)
    assert found is not None and found.step == 3


def test_signals_that_come_together_are_one(tmp_path, monkeypatch):
    now = iter([10.0, 10.01, 12.0])
    monkeypatch.setattr(interrupt, "time", SimpleNamespace(monotonic=lambda: next(now)))
    requests = interrupt.Requests(tmp_path)
    requests.on_stop(signal.SIGTERM, None)
    requests.on_stop(signal.SIGTERM, None)  # as of `timeout`, which also sends it to the group
    assert requests.stop and requests.signal == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        requests.on_stop(signal.SIGINT, None)


def test_the_folder_of_a_running_process_is_locked_until_that_is_killed(start, tmp_path):
    folder = tmp_path / "run"
    child = start(folder, 100, EVERY_STEP, hang_at=4)
    wait_until(lambda: newest_number(folder) == 2, child)

    with pytest.raises(TrainingError, match="another run is training here"), state.locked(folder):
        pass
    child.kill()
    child.join()
    with state.locked(folder):
        found = state.newest(folder)

    assert found is not None and found.step == 2

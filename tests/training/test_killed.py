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

import pytest
import torch

from gouache.errors import TrainingError
from gouache.training import state

from .toys import train_small_autoencoder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

STEPS = 14
KILLS = 6
EVERY_STEP = 1e-9


@pytest.fixture(scope="module")
def start():
    """Starts a run in a process of its own, forked from one that has already imported torch."""
    context = multiprocessing.get_context("forkserver")
    # The first step of an optimizer imports torch._dynamo, which takes seconds.
    context.set_forkserver_preload(["torch._dynamo", "tests.training.toys"])
    started = []

    def go(folder: Path, steps: int, save_seconds: float, hang_at: int = -1):
        child = context.Process(target=train_small_autoencoder, args=(folder, steps, save_seconds, hang_at))
        child.start()
        started.append(child)
        return child

    yield go
    for child in started:
        child.kill()
        child.join()


def newest_number(folder: Path) -> int:
    return max((int(path.name[5:]) for path in state.checkpoints(folder)), default=0)


def wait_until(condition, child, seconds: float = 60) -> None:
    """Until `condition()` is true or the child has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and child.exitcode is None:
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.002)


def test_a_run_killed_at_random_moments_ends_bit_equal_to_an_uninterrupted_one(start, tmp_path):
    uninterrupted, killed = tmp_path / "uninterrupted" / "run", tmp_path / "killed" / "run"
    start(uninterrupted, STEPS, save_seconds=1e9).join()
    rng = random.Random(11)
    reached = killed_midway = 0

    for kill in range(KILLS):
        child = start(killed, STEPS, EVERY_STEP)
        if kill % 4:  # otherwise it is killed while it starts
            wait_until(lambda before=reached: newest_number(killed) > before, child)
        child.join(rng.uniform(0, 0.1))
        child.kill()
        child.join()
        killed_midway += child.exitcode == -signal.SIGKILL
        found = state.newest(killed)
        assert (found.step if found else 0) >= reached
        reached = found.step if found else 0
    assert reached > 0 and killed_midway >= 3
    last = start(killed, STEPS, EVERY_STEP)
    last.join()

    assert last.exitcode == 0
    expected, found = state.newest(uninterrupted), state.newest(killed)
    assert expected is not None and found is not None
    assert found.tensors.keys() == expected.tensors.keys() == {"weights", "ema", "optimizer"}
    for file, tensors in expected.tensors.items():
        assert found.tensors[file].keys() == tensors.keys()
        assert all(torch.equal(found.tensors[file][name], tensor) for name, tensor in tensors.items()), file
    for name in ("step", "best", "ema_updates"):
        assert found.values[name] == expected.values[name]
    assert (killed / "best.safetensors").read_bytes() == (uninterrupted / "best.safetensors").read_bytes()
    assert (killed / "log.jsonl").read_text() == (uninterrupted / "log.jsonl").read_text()
    assert sorted(path.name for path in killed.iterdir()) == [
        "best.safetensors", "lock", "log.jsonl", f"step-{STEPS - 1:08d}", f"step-{STEPS:08d}",
    ]  # fmt: skip


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

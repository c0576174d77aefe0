"""Reading threads leave the processors to the main thread."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gouache.data.workers import reading_threads

THREADS = """
import os, torch
from gouache.data.workers import reading_threads

torch.set_num_threads(3)
(torch.ones(10**6) + 1).sum()
before = len(os.listdir("/proc/self/task"))
pool = reading_threads(2)
counts = list(pool.map(lambda _: torch.get_num_threads(), range(20)))
sums = list(pool.map(lambda _: float((torch.ones(10**6).bfloat16().float() + 1).sum()), range(20)))
print(len(os.listdir("/proc/self/task")) - before, set(counts), set(sums), torch.get_num_threads())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the threads in /proc")
def test_they_start_no_threads_of_their_own() -> None:
    found = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.split("\n")[0] == "2 {1} {2000000.0} 3"


def test_a_thread_that_cannot_start_leaves_no_others_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before, submit, calls = threading.active_count(), ThreadPoolExecutor.submit, []

    def limited(pool: ThreadPoolExecutor, *work: object) -> object:
        calls.append(work)
        if len(calls) == 3:
            raise RuntimeError("can't start new thread")
        return submit(pool, *work)  # type: ignore[arg-type]

    monkeypatch.setattr(ThreadPoolExecutor, "submit", limited)
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="new thread"):
        reading_threads(4)
    assert len(calls) == 3 and threading.active_count() == before and torch.get_num_threads() == threads

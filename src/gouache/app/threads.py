"""How the threads of torch wait for work, and how many there are. To be set before torch is imported.

OpenMP's threads spin while they wait, for milliseconds. On a machine with other work to do, a spinning thread takes the
core from the thread that it waits for: painting with `mini` took 44 to 117 s in place of 5 to 12 s. If they sleep at
once (the wait policy "passive"), a quiet machine loses: waking them takes longer than a small kernel. So they sleep
after a while that is long for a kernel and short for a scheduler. `benchmarks/busy.py` measures both.

The number of threads is not chosen by load: it changes how sums are rounded, and so the pictures. It is limited only
to the share of processors that a container has, which OpenMP does not know.
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

from gouache.errors import FileError
from gouache.outside import read_outside

_GROUPS = Path("/sys/fs/cgroup")
_POLICY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # of the standard, of GCC's OpenMP, of LLVM's
_SPINS = 10_000  # of GCC's OpenMP, which torch has on Linux: some tens of microseconds
_COUNT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")


def configure(environment: MutableMapping[str, str] = os.environ, groups: Path = _GROUPS) -> None:
    """Set the variables that OpenMP reads when torch is loaded. Variables that the user has set are respected."""
    if not any(environment.get(name) for name in _POLICY):
        environment["GOMP_SPINCOUNT"] = str(_SPINS)
    quota = processors_of_group(groups)
    if quota is not None and not any(environment.get(name) for name in _COUNT) and quota < _processors():
        environment["OMP_NUM_THREADS"] = str(quota)


def processors_of_group(groups: Path = _GROUPS) -> int | None:
    """The processors that the control group of a container has the time of, at least 1; None without a limit."""
    quota = _numbers(groups / "cpu.max")  # version 2: "QUOTA PERIOD" or "max PERIOD"
    if len(quota) != 2:
        quota = [*_numbers(groups / "cpu/cpu.cfs_quota_us"), *_numbers(groups / "cpu/cpu.cfs_period_us")]
    if len(quota) != 2 or min(quota) <= 0:
        return None
    return max(1, math.ceil(quota[0] / quota[1]))


def _numbers(path: Path) -> list[int]:
    try:
        return [int(each) for each in read_outside(path, 100).split()]
    except (FileError, ValueError):
        return []


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

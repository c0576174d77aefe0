"""Painting beside other work: how OpenMP's threads wait, as ratios to the default of the system.

    python -m benchmarks.busy              # mini: 2 minutes on a quiet machine
    python -m benchmarks.busy -m MODEL     # another model, at --steps and --size

Each policy paints the same picture in a new process, alternately, first with nothing else running, then beside `--load`
processes (default: one per core) that only count. Run it on a quiet machine: what else runs changes the first column.
Ratios below 1 mean faster than the default of OpenMP, which spins.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gouache.app import threads
from gouache.wording import plural

POLICIES = {
    "default": {},
    "gouache": {},  # what app.threads chooses
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
PAINT = """
import sys, time
import gouache
model = gouache.load(sys.argv[1], device="cpu", dtype=sys.argv[2])
options = {"seed": 1, "size": sys.argv[4] or None}
list(model.paint("a red apple", steps=1, **options))
began = time.perf_counter()
list(model.paint("a red apple", steps=int(sys.argv[3]), **options))
print(time.perf_counter() - began)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="mini")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--size", default="")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--load", type=int, default=os.cpu_count() or 1, help="processes beside, for the busy column")
    parser.add_argument("--only", nargs="*", choices=POLICIES, default=list(POLICIES))
    options = parser.parse_args()
    found = {state: measure(count, options) for state, count in (("idle", 0), ("busy", options.load))}
    print(f"{plural(options.rounds, 'round')}, {plural(os.cpu_count() or 1, 'core')}, busy: {options.load} beside\n")
    print("| policy | idle, s | ratio | busy, s | ratio |\n| --- | ---: | ---: | ---: | ---: |")
    for policy in options.only:
        columns = []
        for times in found.values():
            columns.append(f"{statistics.median(times[policy]):.2f}")
            ratios = [ours / theirs for ours, theirs in zip(times[policy], times["default"])]
            columns.append(f"{statistics.median(ratios):.2f}")
        print(f"| {policy} | {' | '.join(columns)} |")
    return 0


def measure(load: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each round for each policy; the default is always measured."""
    times: dict[str, list[float]] = {policy: [] for policy in ("default", *options.only)}
    with busy(load):
        for number in range(options.rounds):
            for policy, seconds in times.items():
                seconds.append(paint(policy, options))
                print(f"load {load}, round {number + 1}: {policy} {seconds[-1]:.2f} s", file=sys.stderr, flush=True)
    return times


def paint(policy: str, options: argparse.Namespace) -> float:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | POLICIES[policy]
    if policy == "gouache":
        threads.configure(environment)
    command = [sys.executable, "-c", PAINT, options.model, options.dtype, str(options.steps), options.size]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"painting failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that only count."""
    beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for each in beside:
            each.kill()
            each.wait()


if __name__ == "__main__":
    sys.exit(main())

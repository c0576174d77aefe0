"""Runs the fuzzer for a few seconds in every test run, and for ten minutes in the full one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris")

HERE = Path(__file__).parent


def run_fuzzer(seconds: int, folder: Path) -> None:
    command = [sys.executable, str(HERE / "fuzz_readers.py"), f"-max_total_time={seconds}", "-seed=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")

    assert done.returncode == 0, f"an input was saved in {folder}:\n{done.stderr[-3000:]}"
    assert [path.name for path in folder.iterdir()] == []
    print(done.stderr.splitlines()[-1])


@pytest.mark.timeout(120)
def test_fuzzing_for_seconds_finds_no_crash_and_no_side_effect(tmp_path: Path):
    run_fuzzer(3, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_fuzzing_for_ten_minutes_finds_no_crash_and_no_side_effect(tmp_path: Path):
    run_fuzzer(600, tmp_path)

"""A few seconds of fuzzing with every run of the tests, ten minutes of it with the long ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris")

HERE = Path(__file__).parent


def fuzzed(seconds: int, place: Path) -> None:
    command = [sys.executable, str(HERE / "fuzz_readers.py"), f"-max_total_time={seconds}", "-seed=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    ended = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, errors="replace")

    assert ended.returncode == 0, f"an input was kept in {place}:\n{ended.stderr[-3000:]}"
    assert [path.name for path in place.iterdir()] == []
    print(ended.stderr.splitlines()[-1])


@pytest.mark.timeout(120)
def test_no_file_makes_a_reader_fail_or_do_more_than_read(tmp_path: Path):
    fuzzed(8, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_no_file_does_for_ten_minutes(tmp_path: Path):
    fuzzed(600, tmp_path)

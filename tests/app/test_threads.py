"""OpenMP is configured before torch is loaded, and variables of the user are respected."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gouache.app import threads


def test_threads_spin_for_a_short_time_only(tmp_path: Path):
    environment: dict[str, str] = {}

    threads.configure(environment, tmp_path)

    assert environment.keys() == {"GOMP_SPINCOUNT"}
    assert 1_000 < int(environment["GOMP_SPINCOUNT"]) < 300_000  # more is OpenMP's own choice


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_a_policy_of_the_user_is_kept(name: str, tmp_path: Path):
    environment = {name: "active"}

    threads.configure(environment, tmp_path)

    assert environment == {name: "active"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "1 0\n"}, None),
        ({"cpu.max": "no numbers here\n"}, None),
        ({}, None),
    ],
)
def test_the_share_of_a_container_is_read(files: dict[str, str], expected: int | None, tmp_path: Path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    assert threads.processors_of_group(tmp_path) == expected


def test_threads_are_limited_to_the_share_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    monkeypatch.setattr(threads, "_processors", lambda: 64)
    free: dict[str, str] = {}
    limited = {"OMP_NUM_THREADS": "16"}

    threads.configure(free, tmp_path)
    threads.configure(limited, tmp_path)

    assert free["OMP_NUM_THREADS"] == "2" and limited["OMP_NUM_THREADS"] == "16"


def test_torch_uses_the_number_of_threads_and_is_not_imported_by_this_module():
    code = (
        "import sys, os; from gouache.app import threads; threads.configure(); assert 'torch' not in sys.modules; "
        "os.environ['OMP_NUM_THREADS'] = '1'; import torch; print(torch.get_num_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}

    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "1"

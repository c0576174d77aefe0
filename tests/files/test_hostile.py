"""Every file of the hostile corpus is refused with the right error, in bounded time and memory; nothing is run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .corpus import Case, write_corpus

HERE = Path(__file__).parent
SECONDS, MEMORY = 2.0, 300_000_000

UNRESTRICTED = """
import contextlib, io, json, sys, torch
for path in json.load(sys.stdin):
    with contextlib.suppress(BaseException), contextlib.redirect_stdout(io.StringIO()):
        torch.load(path, weights_only=False)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture(scope="module")
def cases(folder: Path) -> list[Case]:
    return write_corpus(folder)


@pytest.fixture(scope="module")
def reports(folder: Path, cases: list[Case]) -> dict[str, dict[str, Any]]:
    paths = json.dumps([str(folder / case.name) for case in cases])
    done = subprocess.run(
        [sys.executable, str(HERE / "examine.py")], input=paths, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    assert list(folder.glob("proof-*")) == [], "a payload was run"
    assert not answer["torch"], "opening files imported torch"
    return {Path(report["path"]).name: report for report in answer["reports"]}


def test_every_file_is_refused_with_the_expected_one_line_error(cases, reports):
    wrong = {
        case.name: (case.verdict, case.message, reports[case.name]["verdict"], reports[case.name]["message"][:300])
        for case in cases
        if reports[case.name]["verdict"] != case.verdict
        or case.message not in reports[case.name]["message"]
        or "\n" in reports[case.name]["message"]
    }

    assert wrong == {}


def test_nothing_is_imported_run_or_opened(reports):
    seen = {name: report["events"] for name, report in reports.items() if report["events"]}

    assert seen == {}


def test_every_refusal_takes_bounded_time_and_memory(reports):
    slow = {name: report["seconds"] for name, report in reports.items() if report["seconds"] > SECONDS}
    large = {name: report["peak"] for name, report in reports.items() if report["peak"] > MEMORY}

    assert (slow, large) == ({}, {})


def test_payloads_run_in_an_unrestricted_loader(folder, cases, reports):
    live = [case.name for case in cases if case.fires]  # after `reports`: only here may a folder `proof-...` appear

    paths = json.dumps([str(folder / name) for name in live])
    subprocess.run([sys.executable, "-c", UNRESTRICTED], input=paths, capture_output=True, text=True, timeout=200)
    end = time.monotonic() + 5
    while (not_run := [name for name in live if not (folder / f"proof-{name}").exists()]) and time.monotonic() < end:
        time.sleep(0.05)

    assert not_run == []
    assert len(live) > 30

"""The command line, run in this process like its console script."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gouache.cli.main import main


@dataclass(frozen=True)
class Ended:
    """The exit code of a command, and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def gouache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, settings: object
) -> Command:
    """`gouache(*arguments)`, in an empty folder, on the CPU and in float32 unless the arguments say otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOUACHE_DEVICE", "cpu")
    monkeypatch.setenv("GOUACHE_DTYPE", "fp32")
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run(*arguments: Any) -> Ended:
        monkeypatch.setattr(sys, "argv", ["gouache", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0 if code is None else 1, printed.out, printed.err)

    return run

"""launch.py: refuses old Pythons, installs once, recovers, and hands arguments and exit codes on."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
posix_only = pytest.mark.skipif(os.name != "posix", reason="the stand-in for Python is a shell script")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A copy of the project's set-up files, in a folder with a space in its name."""
    home = tmp_path / "my project"
    home.mkdir()
    for name in ("launch.py", "pyproject.toml"):
        shutil.copy(ROOT / name, home / name)
    return home


def functions(home: Path) -> dict[str, Any]:
    return runpy.run_path(str(home / "launch.py"), run_name="launch")


def installed(home: Path, stamp: str, script: str) -> None:
    """Pretend that `home` is set up, with `script` in the place of its Python."""
    python = home / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    (home / ".venv" / stamp).write_text(functions(home)["stamp"](""))


def test_an_older_python_is_refused_in_one_line(home: Path) -> None:
    code = (
        "import runpy, sys; sys.version_info = (3, 10, 4, 'final', 0); "
        f"runpy.run_path({str(home / 'launch.py')!r}, run_name='__main__')"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: Gouache needs Python 3.11 or newer; this is Python 3.10"]


@posix_only
def test_arguments_and_the_exit_code_are_handed_on(home: Path, tmp_path: Path) -> None:
    installed(home, "installed", 'echo "$PWD" "$@"; exit 3')

    done = subprocess.run(
        [sys.executable, home / "launch.py", "paint", "a red apple"], capture_output=True, text=True, cwd=tmp_path
    )

    assert done.stdout.strip() == f"{tmp_path} -m gouache.cli.main paint a red apple"
    assert done.returncode == 3


@posix_only
def test_tests_run_in_the_project(home: Path, tmp_path: Path) -> None:
    installed(home, "installed-test", 'echo "$PWD" "$@"')

    done = subprocess.run(
        [sys.executable, home / "launch.py", "test", "-k", "x"], capture_output=True, text=True, cwd=tmp_path
    )

    assert done.stdout.strip() == f"{home} -m pytest -k x"


@posix_only
def test_an_environment_with_the_test_extra_serves_painting_too(home: Path) -> None:
    installed(home, "installed-test", "echo painted")

    done = subprocess.run([sys.executable, home / "launch.py", "paint"], capture_output=True, text=True)

    assert done.stdout == "painted\n"


@posix_only
def test_a_changed_project_is_installed_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(home, "installed", "echo pip")
    with (home / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    launch = functions(home)
    ran: list[list[str]] = []
    monkeypatch.setitem(launch["install"].__globals__, "run", lambda command, what: ran.append(command))
    (home / ".venv/pyvenv.cfg").touch()

    launch["install"]("")

    assert [command[-2:] for command in ran if "--editable" in command] == [["--editable", str(home)]]
    assert (home / ".venv/installed").read_text() == launch["stamp"]("")


@posix_only
def test_a_half_made_environment_is_made_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(home, "other", "exit 1")  # a Python whose pip does not answer
    (home / ".venv/pyvenv.cfg").touch()
    launch = functions(home)
    made: list[Path] = []

    class Venv:
        @staticmethod
        def create(path: Path, with_pip: bool) -> None:
            made.append(path)
            (path / "bin").mkdir(parents=True)
            (path / "bin/python").symlink_to(sys.executable)

    monkeypatch.setitem(launch["install"].__globals__, "venv", Venv)
    monkeypatch.setitem(launch["install"].__globals__, "run", lambda command, what: None)

    launch["install"]("")

    assert made == [home / ".venv"]


def test_a_failed_installation_leaves_no_stamp(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = functions(home)

    def fail(command: list[str], what: str) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setitem(launch["install"].__globals__, "run", fail)
    monkeypatch.setitem(
        launch["install"].__globals__,
        "venv",
        type("Venv", (), {"create": staticmethod(lambda path, with_pip: path.mkdir())}),
    )
    monkeypatch.setitem(launch["install"].__globals__, "sources_are_configured", lambda: True)

    with pytest.raises(subprocess.CalledProcessError):
        launch["install"]("")

    assert not list((home / ".venv").glob("installed*"))


def test_configured_sources_are_left_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "somewhere")

    assert functions(home)["sources_are_configured"]()


def test_the_torch_step_asks_for_the_project_s_own_range(home: Path) -> None:
    assert functions(home)["torch_requirement"]() == "torch>=2.6,<2.14"

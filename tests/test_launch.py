"""launch.py refuses old Pythons, installs once, recovers, and forwards arguments and exit codes."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
posix_only = pytest.mark.skipif(os.name != "posix", reason="Python is replaced by a shell script")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A copy of the project's set-up files, in a folder with a space in its name."""
    home = tmp_path / "my project"
    home.mkdir()
    for name in ("launch.py", "pyproject.toml"):
        shutil.copy(ROOT / name, home / name)
    return home


def launcher(home: Path) -> dict[str, Any]:
    return runpy.run_path(str(home / "launch.py"), run_name="launch")


def fake_installation(home: Path, stamp: str, script: str) -> None:
    """A `.venv` in `home` whose Python is the shell script `script`, with the stamp file `stamp`."""
    python = home / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    (home / ".venv" / stamp).write_text(launcher(home)["stamp"]())


def test_an_older_python_is_refused_in_one_line(home: Path) -> None:
    code = (
        "import runpy, sys; sys.version_info = (3, 10, 4, 'final', 0); "
        f"runpy.run_path({str(home / 'launch.py')!r}, run_name='__main__')"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: Gouache needs Python 3.11 or newer; this is Python 3.10"]


@posix_only
def test_arguments_and_the_exit_code_are_forwarded(home: Path, tmp_path: Path) -> None:
    fake_installation(home, "installed", 'echo "$PWD" "$@"; exit 3')

    done = subprocess.run(
        [sys.executable, home / "launch.py", "paint", "a red apple"], capture_output=True, text=True, cwd=tmp_path
    )

    assert done.stdout.strip() == f"{tmp_path} -m gouache paint a red apple"
    assert done.returncode == 3


@posix_only
def test_the_test_command_runs_pytest_in_the_project_folder(home: Path, tmp_path: Path) -> None:
    fake_installation(home, "installed-test", 'echo "$PWD" "$@"')

    done = subprocess.run(
        [sys.executable, home / "launch.py", "test", "-k", "x"], capture_output=True, text=True, cwd=tmp_path
    )

    assert done.stdout.strip() == f"{home} -m pytest -k x"


@posix_only
def test_an_environment_with_the_test_extra_is_used_for_painting_too(home: Path) -> None:
    fake_installation(home, "installed-test", "echo painted")

    done = subprocess.run([sys.executable, home / "launch.py", "paint"], capture_output=True, text=True)

    assert done.stdout == "painted\n"


@posix_only
def test_a_changed_pyproject_is_installed_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_installation(home, "installed", "echo pip")
    with (home / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    launch = launcher(home)
    commands: list[list[str]] = []
    monkeypatch.setitem(launch["install"].__globals__, "run", lambda command, what: commands.append(command))
    (home / ".venv/pyvenv.cfg").touch()

    launch["install"]("")

    installs = [command for command in commands if "--editable" in command]
    assert [command[-3:] for command in installs] == [[launch["torch_requirement"](), "--editable", str(home)]]
    assert (home / ".venv/installed").read_text() == launch["stamp"]()


@posix_only
def test_an_incomplete_environment_is_created_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_installation(home, "other", "exit 1")  # a Python whose pip does not answer
    (home / ".venv/pyvenv.cfg").touch()
    launch = launcher(home)
    created: list[Path] = []

    class Venv:
        @staticmethod
        def create(path: Path, with_pip: bool) -> None:
            created.append(path)
            (path / "bin").mkdir(parents=True)
            (path / "bin/python").symlink_to(sys.executable)

    monkeypatch.setitem(launch["install"].__globals__, "venv", Venv)
    monkeypatch.setitem(launch["install"].__globals__, "run", lambda command, what: None)

    launch["install"]("")

    assert created == [home / ".venv"]


def test_a_failed_installation_leaves_no_stamp(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = launcher(home)

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


def test_configured_package_sources_are_detected(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "somewhere")

    assert launcher(home)["sources_are_configured"]()


def test_torch_is_the_project_s_requirement_with_the_installer_s_upper_limit(home: Path) -> None:
    dependencies = tomllib.loads((home / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]

    assert "torch>=2.6" in dependencies
    assert launcher(home)["torch_requirement"]() == "torch>=2.6,<2.14"


def test_another_torch_limit_is_installed_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = launcher(home)
    before = launch["stamp"]()

    monkeypatch.setitem(launch["stamp"].__globals__, "TORCH_LIMIT", "<2.15")

    assert launch["stamp"]() != before


def test_a_python_without_ensurepip_is_reported(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = launcher(home)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(SystemExit) as ended:
        launch["create_environment"]()

    assert ended.value.code == 2
    assert "no ensurepip module" in capsys.readouterr().err
    assert not (home / ".venv").exists()


def test_a_folder_that_cannot_be_written_to_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = launcher(home)

    def fail(extra: str) -> None:
        raise PermissionError(13, "Permission denied", str(home))

    monkeypatch.setitem(launch["main"].__globals__, "install", fail)
    monkeypatch.setattr(sys, "argv", ["launch.py", "paint"])

    assert launch["main"]() == 2
    assert capsys.readouterr().err.startswith("error: the installation failed: [Errno 13] Permission denied")


@posix_only
def test_an_interpreter_that_is_gone_is_installed_again(home: Path) -> None:
    """Although the stamp file is there: the link `.venv/bin/python` leads to nothing after an update of the system."""
    fake_installation(home, "installed", "echo painted")
    launch = launcher(home)
    assert launch["is_installed"]("")

    (home / ".venv/bin/python").unlink()
    assert not launch["is_installed"]("")
    (home / ".venv/bin/python").symlink_to("nowhere")
    assert not launch["is_installed"]("")


@posix_only
def test_an_interpreter_that_cannot_be_run_is_one_line(home: Path) -> None:
    fake_installation(home, "installed", "echo painted")
    (home / ".venv/bin/python").write_bytes(b"\x7fELF of another machine")

    done = subprocess.run([sys.executable, home / "launch.py", "paint"], capture_output=True, text=True)

    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot be run" in done.stderr and "delete" in done.stderr


@posix_only
def test_of_two_first_starts_one_installs_and_the_other_waits(home: Path) -> None:
    code = (
        "import pathlib, runpy, sys, time\n"
        f"launch = runpy.run_path({str(home / 'launch.py')!r}, run_name='launch')\n"
        "def install_now(extra):\n"
        "    print('installs', flush=True); time.sleep(1)\n"
        "    python = launch['PYTHON']; python.parent.mkdir(parents=True); python.touch()\n"
        "    (launch['VENV'] / 'installed').write_text(launch['stamp']())\n"
        "launch['install'].__globals__['install_now'] = install_now\n"
        "launch['install']('')\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ended = [(*each.communicate(timeout=60), each.returncode) for each in both]

    assert sorted(out for out, _, _ in ended) == ["", "installs\n"] and [code for *_, code in ended] == [0, 0]
    assert any("waiting for it" in errors for _, errors, _ in ended)

"""The command in its own process: its imports, interrupts, output streams."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from tests.pipelines import Narrow

GOUACHE = [sys.executable, "-m", "gouache.cli.main"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOUACHE_DEVICE", "cpu")
    monkeypatch.setenv("GOUACHE_DTYPE", "fp32")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


IMPORTED = """
import sys, time
begin = time.perf_counter()
from gouache.cli.main import main
for arguments in {lines}:
    sys.argv = ["gouache", *arguments]
    try:
        main()
    except SystemExit as exit:
        assert not exit.code, exit.code
took = time.perf_counter() - begin
loaded = [name for name in {heavy} if name in sys.modules]
print(f"heavy: {{loaded}}, took {{took:.2f}} s")
"""
HEAVY = ["torch", "numpy", "PIL", "safetensors", "tokenizers", "diffusers", "transformers"]


def test_help_imports_nothing_heavy():
    """So that it takes little longer than the start of the interpreter; the time is printed, not asserted."""
    commands = ["paint", "repaint", "inspect", "convert", "samplers", "doctor"]
    lines = [["--help"], ["--version"], *([command, "--help"] for command in commands)]

    ended = subprocess.run(
        [sys.executable, "-c", IMPORTED.format(lines=lines, heavy=HEAVY)], capture_output=True, text=True, check=True
    )

    *_, last = ended.stdout.splitlines()
    print(last)
    assert last.startswith("heavy: [],")
    assert all(command in ended.stdout for command in commands)


def test_the_package_and_its_errors_import_nothing_heavy():
    code = f"import sys, gouache, gouache.errors; print([name for name in {HEAVY} if name in sys.modules])"

    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert ended.stdout == "[]\n"


def test_inspect_needs_no_torch(narrow: Callable[[str], Narrow]):
    lines = [["inspect", str(narrow("sdxl").file)], ["inspect", str(narrow("sd1").folder), "--json"]]

    ended = subprocess.run(
        [sys.executable, "-c", IMPORTED.format(lines=lines, heavy=["torch", "numpy"])],
        capture_output=True,
        text=True,
        check=True,
    )

    print(ended.stdout.splitlines()[-1])
    assert ended.stdout.splitlines()[-1].startswith("heavy: [],")


def read(terminal: int, into: list[str]) -> None:
    """Everything written to a terminal, until its last writer has closed it."""
    with suppress(OSError):  # Linux raises it at the end
        while piece := os.read(terminal, 4096):
            into.append(piece.decode(errors="replace"))


@pytest.mark.timeout(120)
@pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")
def test_an_interrupt_keeps_the_pictures_that_are_done(narrow: Callable[[str], Narrow], tmp_path: Path):
    ours, theirs = pty.openpty()
    command = [*GOUACHE, "paint", "a cat", "-m", str(narrow("sd1").file), "--json", "-o", "out/"]
    command += ["--count", "1000", "--steps", "20", "--size", "64x64", "--seed", "1"]
    # A shell makes background jobs ignore Ctrl-C, and these tests may be one; the command must not inherit that.
    default_interrupt = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, text=True, preexec_fn=default_interrupt
    )
    os.close(theirs)
    shown: list[str] = []
    reader = threading.Thread(target=read, args=(ours, shown))
    reader.start()
    assert process.stdout is not None

    printed = [process.stdout.readline() for _ in range(2)]
    process.send_signal(signal.SIGINT)  # somewhere in the third picture
    printed += process.stdout.read().splitlines()
    code = process.wait(60)
    reader.join()
    os.close(ours)

    done = [tmp_path / json.loads(line)["path"] for line in printed]
    assert code == 130
    assert sorted((tmp_path / "out").iterdir()) == done
    for path in done:
        with Image.open(path) as picture:
            picture.load()
    terminal_text = "".join(shown)
    assert f"stopped; {len(done)} of 1000 pictures are done and saved" in terminal_text
    assert "Traceback" not in terminal_text
    # The error stream is a terminal here, so it shows the progress; standard output has the JSON only.
    assert "painting" in terminal_text and "/s" in terminal_text and '"path"' not in terminal_text


@pytest.mark.timeout(120)
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", ["hash", "models install", "models verify"])
def test_a_command_that_is_interrupted_says_so(
    command: str, number: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also SIGTERM, and not only in `paint`; nothing that it began is left."""
    monkeypatch.setenv("GOUACHE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("GOUACHE_MODELS", str(tmp_path / "models"))
    big = tmp_path / "models/big.safetensors"  # takes a minute to read, and no space
    big.parent.mkdir()
    header = b'{"a":{"dtype":"U8","shape":[60000000000],"data_offsets":[0,60000000000]}}'
    big.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(big, 8 + len(header) + 60_000_000_000)
    arguments = [*command.split(), *([str(big)] if command != "models verify" else [])]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*GOUACHE, *arguments], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=theirs,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(theirs)
    shown: list[str] = []
    while "%" not in "".join(shown) and "/s" not in "".join(shown):  # the progress bar: the work has begun
        shown.append(os.read(ours, 4096).decode(errors="replace"))

    process.send_signal(number)
    read(ours, shown)
    os.close(ours)

    assert process.wait(60) == code, shown
    assert "stopped" in "".join(shown) and "Traceback" not in "".join(shown)
    assert [each.name for each in tmp_path.rglob("*") if each.is_file()] in (
        ["big.safetensors"],
        ["big.safetensors", "library.sqlite"],
        ["library.sqlite", "big.safetensors"],
    )


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        ("KeyboardInterrupt", 130, "stopped\n"),
        (
            "ModuleNotFoundError('no', name='typer')",
            2,
            "error: the package typer is missing; install gouache again "
            "(with launch.py: delete .venv and run it again)\n",
        ),
    ],
)
def test_what_happens_during_the_imports_is_one_line(raised: str, code: int, line: str):
    """Of the console script, and of `python -m gouache`."""
    script = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'typer': raise {raised}\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    for start in (
        "from gouache.__main__ import main; main()",
        "import runpy; runpy.run_module('gouache', {}, '__main__')",
    ):
        ended = subprocess.run([sys.executable, "-c", script + start], capture_output=True, text=True)
        assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", line)


def test_the_console_script_is_the_guarded_one():
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())

    assert pyproject["project"]["scripts"] == {"gouache": "gouache.__main__:main"}


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_closed_pipe_is_not_an_error():
    ended = subprocess.run(
        f"{' '.join(GOUACHE)} samplers --json | head -c 1", shell=True, capture_output=True, text=True, check=True
    )

    assert ended.stdout == "{" and ended.stderr == ""

#!/usr/bin/env python3
"""Set Gouache up and run it: python3 launch.py paint "a red apple on a blue background"

Needs nothing but Python 3.11 or newer. The first run makes `.venv` beside this file and installs the package into it;
later runs go straight to `gouache`, until pyproject.toml changes. `python3 launch.py test ...` runs pytest instead.
"""

import sys

if sys.version_info < (3, 11):
    sys.stderr.write("error: Gouache needs Python 3.11 or newer; this is Python %d.%d\n" % sys.version_info[:2])
    sys.exit(2)

import hashlib
import os
import shutil
import subprocess
import threading
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DOWNLOADS = {"cpu": "about 200 MB (1.1 GB on disk)", "cuda": "about 3 GB (6 GB on disk)"}


def main() -> int:
    arguments = sys.argv[1:]
    testing = arguments[:1] == ["test"]
    try:
        install("test" if testing else "")
    except subprocess.CalledProcessError as error:
        print(f"error: the installation stopped: {error}; run the same command again to go on", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        return 130
    command = (
        [str(PYTHON), "-m", "pytest", *arguments[1:]]
        if testing
        else [str(PYTHON), "-m", "gouache.cli.main", *arguments]
    )
    folder = HERE if testing else None  # pytest looks for its settings here; pictures belong where the user is
    if os.name == "nt" or folder is not None:
        try:
            return subprocess.call(command, cwd=folder)
        except KeyboardInterrupt:
            return 130
    os.execv(command[0], command)  # the command is this process from here on: signals and exit code are its own


def install(extra: str) -> None:
    """Bring `.venv` up to date, unless a stamp says that it is."""
    wanted = stamp(extra)
    if any((VENV / name).is_file() and (VENV / name).read_text() == wanted for name in stamps(extra)):
        return
    if not PYTHON.is_file() or not (VENV / "pyvenv.cfg").is_file():
        shutil.rmtree(VENV, ignore_errors=True)
        say(f"making a virtual environment in {VENV}")
        venv.create(VENV, with_pip=True)
    elif subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode:
        say("the virtual environment is incomplete; making it again")
        shutil.rmtree(VENV)
        venv.create(VENV, with_pip=True)
    build = torch_build()
    say(f"installing: torch for {build.upper()} and the libraries it needs, {DOWNLOADS[build]}; this is done once")
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    if build == "cpu" and not sources_are_configured():
        # PyTorch keeps its CPU builds on an index of its own. Where that cannot be reached, the attempt costs
        # seconds, and the ordinary index serves instead.
        run([*pip, "--retries", "0", "--timeout", "5", "--extra-index-url", CPU_INDEX, torch_requirement()], "torch")
    run(
        [*pip, "--editable", f"{HERE}[{extra}]" if extra else str(HERE)],
        "gouache" + (" and its tests" if extra else ""),
    )
    (VENV / stamps(extra)[0]).write_text(wanted)


def stamps(extra: str) -> list[str]:
    """Files that say what is installed; an environment with the test extra serves the plain one too."""
    return [f"installed-{extra}"] if extra else ["installed", "installed-test"]


def stamp(extra: str) -> str:
    """What an installation depends on: the project's needs, the Python, and where it lies."""
    text = (HERE / "pyproject.toml").read_bytes() + str(HERE).encode() + sys.version.encode()
    return hashlib.sha256(text).hexdigest()


def torch_build() -> str:
    """ "cuda" where an NVIDIA driver answers, else "cpu" (on a Mac that build brings Metal along)."""
    return (
        "cuda"
        if shutil.which("nvidia-smi") and not subprocess.run(["nvidia-smi"], capture_output=True).returncode
        else "cpu"
    )


def torch_requirement() -> str:
    """The line of pyproject.toml that says which torch."""
    import tomllib

    needs = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return next(need for need in needs if need.startswith("torch"))


def sources_are_configured() -> bool:
    """Whether pip was told where to find packages: then those places count, and nothing is added to them."""
    names = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX")
    if any(os.environ.get(name) for name in names):
        return True
    told = subprocess.run([PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    return any(key in told for key in ("index-url", "find-links", "no-index"))


def run(command: list[str], what: str) -> None:
    """Run a step that takes minutes, and show that it is alive."""
    began = time.monotonic()
    done = threading.Event()

    def tick() -> None:
        while not done.wait(1.0):
            if sys.stderr.isatty():
                print(f"\r  {what}: {time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        subprocess.run(command, check=True)
    finally:
        done.set()
        ticker.join()
        print(f"\r  {what}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Set up Gouache and run it: python3 launch.py paint "a red apple on a blue background"

Needs nothing but Python 3.11 or newer. The first run creates `.venv` next to this file and installs the package into
it; later runs start `gouache` directly, until pyproject.toml changes. `python3 launch.py test ...` runs pytest.
"""

import sys

if sys.version_info < (3, 11):
    sys.stderr.write("error: Gouache needs Python 3.11 or newer; this is Python %d.%d\n" % sys.version_info[:2])
    sys.exit(2)

import contextlib
import hashlib
import importlib.util
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
# A limit of this installer, not of the package: pip does not select a CPU build of later releases by itself, and
# downloads the CUDA libraries for a machine without a GPU. Installed in another way, torch may be newer.
TORCH_LIMIT = "<2.14"


def main() -> int:
    arguments = sys.argv[1:]
    testing = arguments[:1] == ["test"]
    try:
        install("test" if testing else "")
    except subprocess.CalledProcessError as error:
        say(f"error: the installation failed: {error}; run the same command again to continue")
        return 2
    except OSError as error:  # no space left, a folder that cannot be written to
        advice = f"check the free space and the permissions of {HERE}, or copy it to a folder of yours"
        say(f"error: the installation failed: {error}; {advice}")
        return 2
    except KeyboardInterrupt:
        say("\nstopped; run the same command again to continue")
        return 130
    command = [str(PYTHON), "-m", "pytest", *arguments[1:]] if testing else [str(PYTHON), "-m", "gouache", *arguments]
    folder = HERE if testing else None  # pytest reads its settings from here; pictures belong in the user's folder
    if os.name == "nt" or folder is not None:
        try:
            return subprocess.call(command, cwd=folder)
        except KeyboardInterrupt:
            return 130
    try:
        os.execv(command[0], command)  # replaces this process, so that signals and the exit code need no forwarding
    except OSError as error:
        say(f"error: {PYTHON} cannot be run: {error.strerror}; delete {VENV} and run the same command again")
        return 2


def install(extra: str) -> None:
    """Bring `.venv` up to date, unless a stamp file shows that it is. `extra` is "" or an optional dependency group."""
    if is_installed(extra):
        return
    with locked():  # another first start may be installing
        if not is_installed(extra):
            install_now(extra)


def is_installed(extra: str) -> bool:
    """Whether the environment has its interpreter and a stamp file of this installation."""
    current = stamp()
    return PYTHON.is_file() and any(
        (VENV / name).is_file() and (VENV / name).read_text() == current for name in stamp_files(extra)
    )


@contextlib.contextmanager
def locked():
    """Wait until no other process installs. This file itself is locked, so that nothing is left behind."""
    with Path(__file__).open("rb") as file:
        try:
            lock(file, wait=False)
        except OSError:
            say("another start is installing; waiting for it")
            with contextlib.suppress(OSError):  # a file system without locks
                lock(file, wait=True)
        yield  # closing the file releases the lock


def lock(file, wait: bool) -> None:
    """Lock an open file. Raises OSError if another process has the lock and `wait` is False."""
    if os.name == "nt":
        import msvcrt

        file.seek(1 << 30)  # a byte after the end, so that the file can still be read
        while True:
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                return
            except OSError:
                if not wait:
                    raise
                time.sleep(0.5)
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def install_now(extra: str) -> None:
    """Create or repair the environment, and install into it."""
    current = stamp()
    if not PYTHON.is_file() or not (VENV / "pyvenv.cfg").is_file():
        say(f"creating a virtual environment in {VENV}")
        create_environment()
    elif subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode:
        say("the virtual environment is incomplete; creating it again")
        create_environment()
    build = torch_build()
    say(f"installing: torch for {build.upper()} and the libraries it needs, {DOWNLOADS[build]}; this is done once")
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    torch = torch_requirement()
    if build == "cpu" and not sources_are_configured():
        # PyTorch publishes its CPU builds on a separate index. If that cannot be reached, the attempt costs seconds,
        # and the default index is used instead.
        run([*pip, "--retries", "0", "--timeout", "5", "--extra-index-url", CPU_INDEX, torch], "torch")
    run(
        [*pip, torch, "--editable", f"{HERE}[{extra}]" if extra else str(HERE)],
        "gouache and the libraries for its tests" if extra else "gouache",
    )
    (VENV / stamp_files(extra)[0]).write_text(current)


def create_environment() -> None:
    """Replace `.venv` by a new environment."""
    if importlib.util.find_spec("ensurepip") is None:  # Debian and Ubuntu package it separately
        say("error: this Python has no ensurepip module, so it cannot create virtual environments with pip")
        say("install it (on Debian and Ubuntu: apt install python3-venv) and run the same command again")
        sys.exit(2)
    shutil.rmtree(VENV, ignore_errors=True)
    venv.create(VENV, with_pip=True)


def stamp_files(extra: str) -> list[str]:
    """Stamp files of environments that satisfy `extra`, the one to write first: the test extra includes the rest."""
    return [f"installed-{extra}"] if extra else ["installed", "installed-test"]


def stamp() -> str:
    """Digest of what an installation depends on: the requirements, the version of Python, and the folder."""
    text = (HERE / "pyproject.toml").read_bytes() + (TORCH_LIMIT + str(HERE) + sys.version).encode()
    return hashlib.sha256(text).hexdigest()


def torch_build() -> str:
    """ "cuda" if an NVIDIA driver responds, else "cpu" (on a Mac, that build includes Metal)."""
    if shutil.which("nvidia-smi") and not subprocess.run(["nvidia-smi"], capture_output=True).returncode:
        return "cuda"
    return "cpu"


def torch_requirement() -> str:
    """The torch requirement of pyproject.toml, with the upper limit of this installer."""
    import tomllib

    requirements = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return next(text for text in requirements if text.startswith("torch")) + "," + TORCH_LIMIT


def sources_are_configured() -> bool:
    """Whether pip has package sources configured: then only those are used, and no index is added to them."""
    names = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX")
    if any(os.environ.get(name) for name in names):
        return True
    settings = subprocess.run([PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    return any(key in settings for key in ("index-url", "find-links", "no-index"))


def run(command: list[str], what: str) -> None:
    """Run a command that takes minutes, with the elapsed time on a terminal. Raises CalledProcessError."""
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

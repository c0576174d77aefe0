"""What a user installs: the wheel is built, installed into a clean environment and paints; the sdist is complete."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from gouache.version import __version__

ROOT = Path(__file__).resolve().parent.parent
DIST_INFO = f"gouache-{__version__}.dist-info"
NOT_IN_SDIST = {".gitignore"}  # hatchling adds it by itself; listed here in case it no longer does


def build(kind: str, source: Path, folder: Path) -> Path:
    """The wheel or the sdist of the project in `source`, built into `folder` without fetching anything."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"gouache-{__version__}"


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    package = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src/gouache").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = files_of(wheel)

    assert {name for name in found if not name.startswith(f"{DIST_INFO}/")} == package
    assert {"gouache/py.typed", "gouache/embedded/mini.safetensors", "gouache/prompts/LICENSE.OpenAI-CLIP"} <= found
    assert {f"{DIST_INFO}/licenses/{name}" for name in ("LICENSE", "NOTICE")} <= found


def test_the_installed_wheel_paints_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    environment, folder = tmp_path / "environment", tmp_path / "empty"
    folder.mkdir()
    python = clean_environment(environment, wheel)
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*arguments: str) -> str:
        done = subprocess.run([python, *arguments], cwd=folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert Path(run("-c", "import gouache; print(gouache.__file__)").strip()).is_relative_to(environment)
    assert run("-m", "gouache", "--version") == f"gouache {__version__}\n"
    run(
        "-m", "gouache", "paint", "a red apple", "--steps", "2", "--size", "64x64", "--device", "cpu", "-o", "apple.png"
    )
    assert (folder / "apple.png").read_bytes().startswith(b"\x89PNG")


def clean_environment(folder: Path, wheel: Path) -> Path:
    """The Python of a new environment with `wheel` and, from this environment, the libraries that it needs."""
    venv.create(folder, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # After pip, which would otherwise find this environment's Gouache there. The .pth files of a folder that is itself
    # added by one are not read, so an editable installation of the working tree stays invisible.
    (site,) = folder.glob("Lib/site-packages" if os.name == "nt" else "lib/python*/site-packages")
    paths = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "libraries.pth").write_text("\n".join(paths))
    return python


def test_a_wheel_built_from_the_sdist_has_the_same_files(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    assert files_of(build("wheel", sdist, tmp_path)) == files_of(wheel)


def test_the_sdist_is_complete(sdist: Path) -> None:
    top = {"src", "tests", "docs", "recipes", "benchmarks", "scripts", "launch.py", "pyproject.toml", "PKG-INFO"}
    top |= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "NOTICE"}

    assert top <= {path.name for path in sdist.iterdir()}


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs a git clone to compare with")
def test_the_sdist_holds_every_file_that_git_tracks(sdist: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    found = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}

    assert tracked - found - NOT_IN_SDIST == set()

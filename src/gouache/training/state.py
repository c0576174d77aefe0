"""Checkpoints on disk: a run can be killed at any moment and resumes from the newest undamaged one.

A checkpoint is a folder `step-00001000`. Its weights, averages and optimizer state are safetensors files, the rest is
JSON; `manifest.json`, with the size and SHA-256 of every file, is written last. The folder is written under a temporary
name, every file is synced and read back, then the folder is renamed. A folder whose manifest is missing or does not
match is ignored. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gouache.errors import TrainingError
from gouache.files.write import write_atomic, write_safetensors

# 1 numbered the optimizer's tensors instead of naming them; 1 and 2 contain all weights, trained or not, and no
# configuration of the objective. Both are still read.
FORMAT = 3


@dataclass(frozen=True)
class State:
    """The contents of a checkpoint: `tensors[file][name]`, and `values` for JSON (step, settings, ...)."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.values["step"])


def save(folder: Path, state: State, keep: int) -> Path:
    """Write and verify `state` in `folder`, then remove all but the newest `keep` checkpoints. Returns its path.

    Raises FileError or TrainingError if the disk is full or fails; older checkpoints are then kept.
    """
    final = folder / f"step-{state.step:08d}"
    part = folder / f"{final.name}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        digests = {
            f"{name}.safetensors": write_safetensors(part / f"{name}.safetensors", tensors)
            for name, tensors in state.tensors.items()
        }
        digests["state.json"] = _write_json(part / "state.json", dict(state.values))
        entries = {name: {"bytes": (part / name).stat().st_size, "sha256": digest} for name, digest in digests.items()}
        _write_json(part / "manifest.json", {"format": FORMAT, "step": state.step, "files": entries})
        os.replace(part, final)  # fails if it exists already: each step is saved once
        _sync(folder)
    except OSError as error:
        raise TrainingError(f"{final}: cannot be written: {error.strerror}; older checkpoints are kept") from None
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest(folder: Path) -> State | None:
    """The newest undamaged checkpoint in `folder`, None if there is no checkpoint at all. Changes nothing on disk.

    Raises TrainingError if checkpoints exist but all are damaged: a run never silently starts over.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        if (state := _load(path)) is not None:
            return state
    if found:
        raise TrainingError(
            f"{folder}: all checkpoints are damaged ({', '.join(path.name for path in found)}); "
            "restore one from a backup, or use another folder to start over"
        )
    return None


def set_aside(folder: Path, after: int) -> None:
    """Append `.bad` to the names of checkpoints after step `after`, which are damaged, so that they can be examined."""
    for path in checkpoints(folder):
        if _number(path) > after:
            os.replace(path, _free_name(path))


def checkpoints(folder: Path) -> list[Path]:
    """Folders named as checkpoints, in the order of the step in their names; dates do not matter."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(found, key=_number)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` for one run; a second run is refused. The lock of a killed run ends with its process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written to ({error.strerror}); use another folder") from None
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no flock; checkpoints are still complete there, because they are renamed
            pass
        except OSError:
            raise TrainingError(f"{folder}: another run is training here; wait for it, or use another folder") from None
        for leftover in folder.glob("step-*.part"):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in folder.glob(".gouache-*.tmp"):  # of files.write, when a run was killed
            leftover.unlink(missing_ok=True)
        yield


def _number(path: Path) -> int:
    return int(path.name[5:])


def _free_name(path: Path) -> Path:
    """`path` with `.bad` appended, and a number if that name is taken."""
    names = (path.with_name(f"{path.name}.bad{number or ''}") for number in range(10_000))
    return next(name for name in names if not name.exists())


def _load(path: Path) -> State | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] > FORMAT:
            raise TrainingError(f"{path}: has format {manifest['format']}, written by a newer Gouache; update Gouache")
        if any(_entry(path / name) != entry for name, entry in manifest["files"].items()):
            return None
        values = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if values["step"] != _number(path):
            return None
        names = [Path(name).stem for name in manifest["files"] if name.endswith(".safetensors")]
        return State({name: load_file(path / f"{name}.safetensors") for name in names}, values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None


def _write_json(path: Path, value: object) -> str:
    """Write `value` to `path`; returns the SHA-256 of the file."""
    text = json.dumps(value, indent=1).encode()
    write_atomic(path, text)
    return hashlib.sha256(text).hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    """The size and digest of a file, as in the manifest."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(folder: Path) -> None:
    """Flush a folder's directory entries to the disk."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

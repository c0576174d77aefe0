"""Checkpoints: a run can be killed at any instant and goes on from the newest one that is whole.

A checkpoint is a folder `step-00001000`. Its weights, averages and optimizer are safetensors, the rest is JSON;
`manifest.json`, with the size and SHA-256 of every file, is written last. The folder is filled under another name,
every file synced and read back, and renamed: a folder without a manifest that holds true does not count. Nothing is
pickled.
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

FORMAT = 2  # 1 had the optimizer's tensors under numbers instead of names; it is still read


@dataclass(frozen=True)
class State:
    """What a checkpoint holds: `tensors[file][name]`, and `values` that JSON can say (step, settings, ...)."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.values["step"])


def save(folder: Path, state: State, keep: int) -> Path:
    """Write `state` into `folder`, verified, then remove all but the newest `keep`. Returns its path.

    Raises FileError or TrainingError where the disk is full or fails; older checkpoints then stand.
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
        seals = {name: {"bytes": (part / name).stat().st_size, "sha256": digest} for name, digest in digests.items()}
        _write_json(part / "manifest.json", {"format": FORMAT, "step": state.step, "files": seals})
        os.replace(part, final)  # fails if the step is there already: each is saved once
        _sync(folder)
    except OSError as error:
        raise TrainingError(f"{final}: cannot be written: {error.strerror}; older checkpoints stand") from None
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest(folder: Path) -> State | None:
    """The newest checkpoint in `folder` that is whole, None if there never was one. Changes nothing on the disk.

    Raises TrainingError where checkpoints exist but all are damaged: a run never starts again silently.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        if (state := _load(path)) is not None:
            return state
    if found:
        raise TrainingError(
            f"{folder}: all checkpoints are damaged ({', '.join(path.name for path in found)}); "
            "restore one from a backup, or give another folder to start anew"
        )
    return None


def set_aside(folder: Path, after: int) -> None:
    """Name checkpoints of steps beyond `after`, which were found damaged, `.bad`, for whoever wants to look."""
    for path in checkpoints(folder):
        if _number(path) > after:
            os.replace(path, _free_name(path))


def checkpoints(folder: Path) -> list[Path]:
    """Folders named as checkpoints, oldest step first; the number in the name counts, not its date."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(found, key=_number)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for one run; a second one is refused. A killed run's lock is gone with its process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written to ({error.strerror}); give another folder") from None
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no flock; there the rename of checkpoints still keeps them whole
            pass
        except OSError:
            raise TrainingError(
                f"{folder}: another run is training here; wait for it, or give another folder"
            ) from None
        for litter in folder.glob("step-*.part"):
            shutil.rmtree(litter, ignore_errors=True)
        for litter in folder.glob(".gouache-*.tmp"):  # what files.write was about when a run was killed
            litter.unlink(missing_ok=True)
        yield


def _number(path: Path) -> int:
    return int(path.name[5:])


def _free_name(path: Path) -> Path:
    """`path` with `.bad` at its end, and a number where that is taken."""
    names = (path.with_name(f"{path.name}.bad{number or ''}") for number in range(10_000))
    return next(name for name in names if not name.exists())


def _load(path: Path) -> State | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] > FORMAT:
            raise TrainingError(f"{path}: has format {manifest['format']}, of a newer Gouache; update this one")
        if any(_seal(path / name) != seal for name, seal in manifest["files"].items()):
            return None
        values = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if values["step"] != _number(path):
            return None
        names = [Path(name).stem for name in manifest["files"] if name.endswith(".safetensors")]
        return State({name: load_file(path / f"{name}.safetensors") for name in names}, values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None


def _write_json(path: Path, value: object) -> str:
    """`value` as the file `path`; returns its SHA-256."""
    text = json.dumps(value, indent=1).encode()
    write_atomic(path, text)
    return hashlib.sha256(text).hexdigest()


def _seal(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(folder: Path) -> None:
    """Push a folder's list of names to the disk."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints: a run can be killed at any instant and goes on from the newest one that is whole.

A checkpoint is a folder `step-00001000`. Its weights, averages and optimizer are safetensors, the rest is JSON;
`manifest.json`, with the size and SHA-256 of every file, is written last. The folder is filled under another name,
synced, and renamed: a folder without a manifest that holds true does not count. Nothing is pickled.
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

from safetensors.torch import load_file, save_file
from torch import Tensor

from gouache.errors import TrainingError

FORMAT = 1


@dataclass(frozen=True)
class State:
    """What a checkpoint holds: `tensors[file][name]`, and `values` that JSON can say (step, seed, settings...)."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.values["step"])


def save(folder: Path, state: State, keep: int) -> Path:
    """Write `state` into `folder`, verify it, then remove all but the newest `keep`. Returns its path."""
    final = folder / f"step-{state.step:08d}"
    part = folder / f"{final.name}.part"
    _need_room(folder, state)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, tensors in state.tensors.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, part / f"{name}.safetensors")
    (part / "state.json").write_text(json.dumps(dict(state.values), indent=1))
    files = sorted(part.iterdir())
    for path in files:
        _sync(path)
    manifest = {"format": FORMAT, "step": state.step, "files": {path.name: _seal(path) for path in files}}
    (part / "manifest.json").write_text(json.dumps(manifest, indent=1))
    _sync(part / "manifest.json")
    _sync(part)
    if final.exists():  # a step is saved once; what stands there was found damaged, or is the very same
        shutil.rmtree(final)
    os.replace(part, final)
    _sync(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, part)
    _sync(part)
    os.replace(part, path)


def newest(folder: Path) -> State | None:
    """The newest checkpoint in `folder` that is whole; damaged ones are set aside as `.bad`. None if none ever was.

    Raises TrainingError where checkpoints exist but all are damaged: a run never starts again silently.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        if (state := _load(path)) is not None:
            return state
        os.replace(path, path.with_name(f"{path.name}.bad"))
    if found:
        raise TrainingError(
            f"{folder}: all {len(found)} checkpoints are damaged and now end in .bad; "
            "restore one from a backup, or give another folder to start anew"
        )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Folders named as checkpoints, oldest step first; the number in the name counts, not its date."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for one run; a second one is refused. A killed run's lock is gone with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
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
        yield


def _load(path: Path) -> State | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT or any(_seal(path / name) != seal for name, seal in manifest["files"].items()):
            return None
        values = json.loads((path / "state.json").read_text())
        names = [Path(name).stem for name in manifest["files"] if name.endswith(".safetensors")]
        return State({name: load_file(path / f"{name}.safetensors") for name in names}, values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _seal(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _need_room(folder: Path, state: State) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    need = sum(tensor.nbytes for tensors in state.tensors.values() for tensor in tensors.values()) + 1_000_000
    free = shutil.disk_usage(folder).free
    if free < need:
        raise TrainingError(f"{folder}: a checkpoint needs {need >> 20} MB and {free >> 20} MB are free; make room")


def _sync(path: Path) -> None:
    """Push a file, or a folder's list of names, to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

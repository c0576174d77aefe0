"""Checkpoints on disk: a run can be killed at any moment and resumes from the newest undamaged one.

A checkpoint is a folder `step-00001000`. Its weights, averages and optimizer state are safetensors files, the rest is
JSON; `manifest.json`, with the size and SHA-256 of every file, is written last. The folder is written under a temporary
name, every file is synced and read back, then the folder is renamed. A folder whose manifest is missing or does not
match is passed over, and the caller is notified. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from torch import Tensor

from gouache.errors import FileError, TrainingError, printable
from gouache.files.source import size_text
from gouache.files.write import remove_stale_temporaries, sync_folder, write_atomic, write_safetensors
from gouache.outside import MalformedText, open_outside, parse_json, read_outside, reason
from gouache.training.sharded_state import Read, read_whole

# 1 numbered the optimizer's tensors instead of naming them; 1 and 2 contain all weights, trained or not, and no
# configuration of the objective. Both are still read.
FORMAT = 3

_ATTEMPTS = 10  # at a lock
_SPARE = 16_000_000  # bytes that must stay free on the disk
# A file of a checkpoint, or one of the parts of a group of tensors; no other path can be in a manifest.
_FILE = re.compile(r"([a-z]+/)?[A-Za-z0-9_-]+\.(safetensors|json)")

OnNote = Callable[[str], None]
"""Receives one line on something that the user should know and that does not stop the run."""


@dataclass(frozen=True)
class State:
    """The contents of a checkpoint: `tensors[file][name]`, and `values` for JSON (step, settings, ...)."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.values["step"])


def save(
    folder: Path, state: State, keep: int, also: Collection[int] = (), write: Callable[[Path], None] | None = None
) -> Path:
    """Write and verify `state` in `folder`, then remove older checkpoints. Returns its path.

    The newest `keep` are kept, and those of the steps `also`. `write` writes the tensors into the folder that it
    receives, in parts; by default each group becomes one file. Raises TrainingError if the disk is full or fails; then
    nothing is removed.
    """
    final = folder / f"step-{state.step:08d}"
    part = folder / f"{final.name}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        check_space(folder, sum(each.nbytes for tensors in state.tensors.values() for each in tensors.values()))
        part.mkdir()
        if write is None:
            digests = {
                f"{name}.safetensors": write_safetensors(part / f"{name}.safetensors", tensors)
                for name, tensors in state.tensors.items()
            }
        else:
            write(part)
            files = sorted(part.glob("*/*.safetensors"))
            digests = {file.relative_to(part).as_posix(): _entry(file)["sha256"] for file in files}
        digests["state.json"] = _write_json(part / "state.json", dict(state.values))
        entries = {name: {"bytes": (part / name).stat().st_size, "sha256": digest} for name, digest in digests.items()}
        _write_json(part / "manifest.json", {"format": FORMAT, "step": state.step, "files": entries})
        os.replace(part, final)  # fails if it exists already: each step is saved once
        sync_folder(folder)
    except (OSError, FileError) as error:
        shutil.rmtree(part, ignore_errors=True)
        problem = reason(error) if isinstance(error, FileError) else f"cannot be written: {error.strerror}"
        raise TrainingError(
            f"{printable(str(final))}: {problem.partition(';')[0]}; older checkpoints are kept, start the run again to "
            "resume it"
        ) from None
    for old in checkpoints(folder)[:-keep]:
        if number(old) not in also:
            shutil.rmtree(old, ignore_errors=True)
    return final


def check_space(folder: Path, size: int) -> None:
    """Raises TrainingError unless a checkpoint of `size` bytes can be added on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if size + _SPARE > free:
        raise TrainingError(
            f"{printable(str(folder))}: a checkpoint needs {size_text(size + _SPARE)} with a reserve, but "
            f"{size_text(free)} are free on that disk; free some space and start the run again, it resumes from the "
            "newest checkpoint"
        )


def newest(
    folder: Path,
    *,
    fault: Callable[[State], str] | None = None,
    on_note: OnNote | None = None,
    read: Read = read_whole,
) -> State | None:
    """The newest undamaged checkpoint in `folder`, None if there is no checkpoint at all. Changes nothing on disk.

    `fault` returns what a checkpoint lacks, "" if it is complete. `on_note` receives a line for each checkpoint that is
    passed over; `read` reads a group of tensors. Raises TrainingError if checkpoints exist but all are damaged: a run
    never silently starts over.
    """
    found = checkpoints(folder)
    reasons: dict[str, str] = {}
    for path in reversed(found):
        try:
            state = _load(path, read)
            if lacks := fault(state) if fault is not None else "":
                raise _Damaged(lacks)
        except _Damaged as error:
            reasons[path.name] = str(error)
            continue
        if on_note is not None:
            for name, why in reasons.items():
                on_note(f"{printable(str(folder / name))} is damaged ({why}): the run goes on from step {state.step}")
        return state
    if found:
        listed = ", ".join(f"{name}: {why}" for name, why in sorted(reasons.items()))
        raise TrainingError(
            f"{printable(str(folder))}: all checkpoints are damaged ({listed}); restore one from a backup, or use "
            "another folder to start over"
        )
    return None


def read(path: Path) -> State:
    """The checkpoint in the folder `path`, such as that of an earlier step. Raises TrainingError if it is damaged."""
    try:
        return _load(path)
    except _Damaged as error:
        raise TrainingError(f"{printable(str(path))}: is damaged ({error}); use another checkpoint") from None


def start_over(folder: Path, on_note: OnNote) -> None:
    """Before step 0 in a folder without checkpoints: report the traces of an earlier run.

    A run that was killed before its first checkpoint leaves its log; otherwise the checkpoints were removed or renamed.
    """
    traces = ["log.jsonl"] if (folder / "log.jsonl").exists() else []
    traces += sorted(path.name for path in folder.glob("step-*.bad*"))
    if traces:
        on_note(
            f"{printable(str(folder))} has no checkpoint, but {printable(', '.join(traces))} of an earlier run: the "
            "run starts from step 0"
        )


def set_aside(folder: Path, after: int) -> None:
    """Append `.bad` to the names of checkpoints after step `after`, which are damaged, so that they can be examined."""
    for path in checkpoints(folder):
        if number(path) > after:
            try:
                os.replace(path, _free_name(path, ".bad"))
            except OSError as error:
                raise TrainingError(
                    f"{printable(str(path))}: is damaged and cannot be renamed ({error.strerror}); remove it"
                ) from None


def checkpoints(folder: Path) -> list[Path]:
    """Folders named as checkpoints, in the order of the step in their names; dates do not matter."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(found, key=number)


def is_locked(folder: Path) -> bool:
    """Whether a run trains in `folder` now; False where there are no locks (Windows)."""
    try:
        import fcntl

        with open_outside(folder / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError, FileError):
        pass
    return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` for one run; a second run is refused. The lock of a killed run ends with its process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
    except OSError as error:
        shown = printable(str(folder))
        raise TrainingError(f"{shown}: cannot be written to ({error.strerror}); use another folder") from None
    with file:
        if not _lock(file):
            shown = printable(str(folder))
            raise TrainingError(f"{shown}: another run is training here; wait for it, or use another folder")
        for leftover in folder.glob("step-*.part"):
            shutil.rmtree(leftover, ignore_errors=True)
        remove_stale_temporaries(folder, ".tmp")
        yield


def _lock(file: TextIO) -> bool:
    """Lock an open file; False if it stays locked. `is_locked` locks it too, for an instant: that is waited for."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; checkpoints are still complete there, because they are renamed
        return True
    for attempt in range(_ATTEMPTS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.02 if attempt + 1 < _ATTEMPTS else 0)
    return False


def number(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(path.name[5:])


def _free_name(path: Path, ending: str) -> Path:
    """`path` with `ending` appended, and a number if that name is taken."""
    names = (path.with_name(f"{path.name}{ending}{number or ''}") for number in range(10_000))
    return next(name for name in names if not name.exists())


class _Damaged(Exception):
    """A checkpoint cannot be used; the message is the reason."""


def _load(path: Path, read: Read = read_whole) -> State:
    """The checkpoint in the folder `path`. Raises _Damaged, or TrainingError for a newer format."""
    manifest = _json(path / "manifest.json")
    written, files = manifest.get("format"), manifest.get("files")
    if type(written) is not int or not isinstance(files, dict):
        raise _Damaged("manifest.json does not list its files")
    if written > FORMAT:
        raise TrainingError(f"{printable(str(path))}: has format {written}, written by a newer Gouache; update Gouache")
    if manifest.get("step", number(path)) != number(path):
        raise _Damaged("manifest.json is that of another step")
    if "state.json" not in files:
        raise _Damaged("manifest.json does not list state.json")
    if not any(name.startswith(("weights.", "weights/")) for name in files):
        raise _Damaged("manifest.json does not list weights.safetensors")
    for name, entry in files.items():
        if not _FILE.fullmatch(name):
            raise _Damaged(f"manifest.json lists {printable(name, 60)!r}")
        if _entry(path / name) != entry:
            raise _Damaged(f"{name} is not the file that manifest.json describes")
    values = _json(path / "state.json")
    if type(values.get("step")) is not int or values["step"] != number(path):
        raise _Damaged("state.json is that of another step")
    names = {name.partition("/")[0] for name in files if name.endswith(".safetensors")}
    try:
        return State({Path(name).stem: read(path / name) for name in sorted(names)}, values)
    except (OSError, SafetensorError) as error:
        raise _Damaged(printable(str(error))) from None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_outside(path))
    except FileError as error:
        raise _Damaged(f"{path.name} {reason(error)}") from None
    except MalformedText as error:
        raise _Damaged(f"{path.name} {error}") from None
    if not isinstance(value, dict):
        raise _Damaged(f"{path.name} is not a JSON object")
    return value


def _write_json(path: Path, value: object) -> str:
    """Write `value` to `path`; returns the SHA-256 of the file."""
    text = json.dumps(value, indent=1).encode()
    write_atomic(path, text)
    return hashlib.sha256(text).hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    """The size and digest of a file, as in the manifest."""
    try:
        with open_outside(path) as file:
            size = os.fstat(file.fileno()).st_size
            return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}  # type: ignore[arg-type]
    except FileError as error:
        raise _Damaged(f"{path.name} {reason(error)}") from None
    except OSError as error:
        raise _Damaged(f"{path.name} cannot be read: {error.strerror}") from None

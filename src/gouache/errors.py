"""The exceptions of this package, one small tree.

    GouacheError
    ├── FileError          a file cannot be used; has its path
    │   ├── DamagedFile    the format is known, but the file is broken: truncated, overlapping, not decodable
    │   ├── UnsafeFile     it tries to run code, or would need far more memory than it has bytes
    │   └── NotAModel      it is something else: a web page, a picture, a TensorFlow index, an empty file
    ├── ModelError         the file is readable, but is not the requested model
    ├── RequestError       a setting is unknown or out of range; has the setting's name
    ├── DeviceError        this machine cannot do it: no such device, not enough memory
    └── TrainingError      a run cannot start, continue or resume

Every message is one line that says what was found, where, what was expected and what to do. The command line
prints it without a traceback and exits with code 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class GouacheError(Exception):
    """Anything that a user can cause and fix. The message is one line that can be shown unchanged."""


class FileError(GouacheError):
    """A file cannot be used. `path` is the file; the message begins with it."""

    def __init__(self, path: str | Path, message: str) -> None:
        self.path = Path(path)
        super().__init__(f"{printable(str(path))}: {message}")


class DamagedFile(FileError):
    """The file has a known format but breaks its rules, or is truncated."""


class PickleFinding(NamedTuple):
    """A name found in a pickle: its full name, its byte position, and the plain arguments of the call, as text.

    The byte is None where the call only becomes visible after the pickle's object graph has been built.
    """

    name: str
    byte: int | None
    arguments: tuple[str, ...] = ()


class UnsafeFile(FileError):
    """The file contains something that no weights need: a call, an import, a memory bomb. Nothing was run.

    `calls` lists the refused calls, if calls were the reason for refusing; `imports` lists the globals that the pickle
    imports besides, without calling them.
    """

    def __init__(
        self,
        path: str | Path,
        message: str,
        calls: tuple[PickleFinding, ...] = (),
        imports: tuple[PickleFinding, ...] = (),
    ) -> None:
        self.calls, self.imports = calls, imports
        super().__init__(path, message)


class NotAModel(FileError):
    """The file is not a model file; the message says what it is."""


class ModelError(GouacheError):
    """The tensors were read, but they are not the requested model, or not all of it."""


class RequestError(GouacheError):
    """A setting has an invalid value. `setting` is its name, the same in Python, on the command line and in JSON."""

    def __init__(self, setting: str, message: str) -> None:
        self.setting = setting
        super().__init__(f"{setting}: {message}")


class DeviceError(GouacheError):
    """This machine cannot run the request: the device does not exist or has too little memory."""


class TrainingError(GouacheError):
    """A training run cannot start, continue or resume. What was saved so far is not lost."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: of Python, of torch on the CPU or a device, or of a library of the device."""
    text = str(error)
    return isinstance(error, MemoryError) or any(
        each in text for each in ("out of memory", "allocate memory", "bad_alloc", "ALLOC_FAILED")
    )


def printable(text: str, limit: int = 200) -> str:
    """`text` on one line, with control characters escaped: names that come from files are not trusted."""
    cleaned = "".join(ch if ch.isprintable() else f"\\x{ord(ch):02x}" for ch in text)
    return cleaned if len(cleaned) <= limit else cleaned[: limit - 3] + "..."

"""What can go wrong, as one small tree.

    GouacheError
    ├── FileError          a file cannot be used; carries its path
    │   ├── DamagedFile    it is what it claims to be, but broken: truncated, overlapping, not decodable
    │   ├── UnsafeFile     it asks for code to be run, or for more memory than it has bytes
    │   └── NotAModel      it is something else: a web page, a picture, a TensorFlow index, an empty file
    ├── ModelError         a readable file does not make the model that was asked for
    ├── RequestError       a setting is unknown or out of range; carries the setting's name
    ├── DeviceError        this machine cannot do it: no such device, not enough memory
    └── TrainingError      a run cannot start, go on, or be resumed

Every message is one line that says what was found, where, what was expected and what to do. The command line
prints it without a traceback and ends with exit code 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class GouacheError(Exception):
    """Anything a user can cause and mend. The message is one line, fit to be shown as it is."""


class FileError(GouacheError):
    """A file cannot be used. `path` is the file, and stands at the head of the message."""

    def __init__(self, path: str | Path, message: str) -> None:
        self.path = Path(path)
        super().__init__(f"{printable(str(path))}: {message}")


class DamagedFile(FileError):
    """The file has a known format and breaks its rules, or ends too early."""


class Asked(NamedTuple):
    """What a file asked for: its full name, the byte where it does, and the plain values handed to it, as text.

    The byte is None where the call only shows once the pickle is put together.
    """

    name: str
    byte: int | None
    arguments: tuple[str, ...] = ()


class UnsafeFile(FileError):
    """The file asks for something that no weights need: a call, an import, a bomb. Nothing of it was run.

    `asked` lists the calls, where calls are what was refused, and `named` what it merely mentions beside them.
    """

    def __init__(
        self, path: str | Path, message: str, asked: tuple[Asked, ...] = (), named: tuple[Asked, ...] = ()
    ) -> None:
        self.asked, self.named = asked, named
        super().__init__(path, message)


class NotAModel(FileError):
    """The bytes are something other than a model file; the message names what they are."""


class ModelError(GouacheError):
    """The tensors were read, but they are not the model that was asked for, or not all of it."""


class RequestError(GouacheError):
    """A setting has a value that cannot be used. `setting` is its one name in Python, CLI and JSON."""

    def __init__(self, setting: str, message: str) -> None:
        self.setting = setting
        super().__init__(f"{setting}: {message}")


class DeviceError(GouacheError):
    """This machine cannot do what was asked: the device is absent or its memory too small."""


class TrainingError(GouacheError):
    """A training run cannot start, continue or resume; nothing saved so far is lost."""


def printable(text: str, limit: int = 200) -> str:
    """`text` on one line, free of control characters: names in files are hostile until shown harmless."""
    cleaned = "".join(ch if ch.isprintable() else f"\\x{ord(ch):02x}" for ch in text)
    return cleaned if len(cleaned) <= limit else cleaned[: limit - 3] + "..."

"""Coverage-guided fuzzing of the readers: python tests/fuzz/fuzz_readers.py [libFuzzer's options] [FOLDER]

For any bytes, opening a file must return a record whose tensors can all be read, or raise a GouacheError with a
one-line message; and nothing else may be imported, run or opened. Anything else is a finding: the process ends with
an error, and the input is saved in a file `crash-...` (`slow-...`, `oom-...`). Pass this file as an argument to
reproduce the finding.

FOLDER collects inputs that reach new code, for the next run; without it, a run begins with the seeds only. Needs
atheris, which is available for Linux.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import atheris

with atheris.instrument_imports(include=["gouache.files"]):  # pyright: ignore[reportAttributeAccessIssue]
    from gouache.files.open import open_model

# Everything that reading needs is imported before auditing begins.
import numpy  # noqa: F401
import torch  # noqa: F401
from PIL import Image

from gouache.errors import GouacheError
from tests.fuzz.seeds import file_of, seeds

Image.init()

# Events of reading a file, listing a folder and raising an error.
HARMLESS = ("mmap.__new__", "os.listdir", "os.scandir", "builtins.id", "object.__getattr__", "sys._getframe",
            "cpython.", "gc.")  # fmt: skip
MAX_GROWTH = (4, 1_000_000)  # the reader's limit: a tensor with stride 0 may have 4 * file size + 1,000,000 bytes

events: list[str] = []
audited = ""  # while a file is read: the folder whose files may be opened; else ""


def _is_inside(path: object) -> bool:
    """Whether it is in the folder that may be read, or a descriptor, which was opened before."""
    return isinstance(path, int) or str(path).startswith(audited)


def audit(event: str, arguments: tuple[object, ...]) -> None:
    if not audited or event.startswith(HARMLESS):
        return
    if event == "open" and _is_inside(arguments[0]) and not int(str(arguments[2])) & os.O_ACCMODE:
        return
    events.append(f"{event} {str(arguments)[:200]}")


def read(path: Path, data: bytes) -> None:
    global audited
    content = file_of(data)
    path.unlink(missing_ok=True)  # a new file, because the last one may still be mapped
    path.write_bytes(content)
    audited = str(path.parent)
    try:
        file = open_model(path)
        for name, info in file.tensors.items():
            tensor = file.tensor(name)
            if tuple(tensor.shape) != info.shape or tensor.numel() * tensor.element_size() != info.nbytes:
                raise AssertionError(f"{name!r} is {tuple(tensor.shape)}, expected {info}")
            if info.nbytes > MAX_GROWTH[0] * len(content) + MAX_GROWTH[1]:
                raise AssertionError(f"{name!r} takes {info.nbytes} bytes in a file of {len(content)}")
            tensor.contiguous().view(-1)[:1].tolist()
    except GouacheError as error:
        if "\n" in str(error):
            raise AssertionError("the message has several lines") from error
    finally:
        audited = ""
    if events:
        raise AssertionError(f"reading caused other events: {events}")


def fuzz(folder: Path) -> None:
    """Does not return: libFuzzer ends the process."""
    arguments = list(sys.argv)
    if not any(Path(each).is_file() for each in arguments[1:]):
        seed_folder = folder / "seeds"
        seed_folder.mkdir()
        for number, seed in enumerate(seeds()):
            (seed_folder / f"{number:05}").write_bytes(seed)
        arguments.append(str(seed_folder))
        if len([each for each in arguments if not each.startswith("-")]) == 2:
            arguments.insert(1, str(folder / "found"))  # libFuzzer writes new inputs to the first folder
            (folder / "found").mkdir()
    for option, value in (("-max_len", 20_000), ("-timeout", 10), ("-rss_limit_mb", 3000)):
        if not any(each.startswith(f"{option}=") for each in arguments):
            arguments.append(f"{option}={value}")
    (folder / "m").mkdir()
    sys.addaudithook(audit)
    atheris.Setup(arguments, lambda data: read(folder / "m" / "m.ckpt", data))
    atheris.Fuzz()


def main() -> int:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        child = os.fork()
        if not child:
            try:
                fuzz(Path(folder))
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())

"""Coverage-guided fuzzing of the readers: python tests/fuzz/fuzz_readers.py [libFuzzer's options] [FOLDER]

Whatever the bytes of a file are, opening it ends with a record whose tensors can all be read, or with a GouacheError
of one line; and nothing is imported, run or opened on the way. Anything else is a finding: the process ends with an
error, and the input stands in a file `crash-...` (`slow-...`, `oom-...`), which, given as an argument, does it again.

FOLDER keeps what is found to reach new code, for the next time; without one, a run begins with the seeds alone.
Needs atheris, which exists for Linux.
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

# What reading needs is imported before the watch begins.
import numpy  # noqa: F401
import torch  # noqa: F401
from PIL import Image

from gouache.errors import GouacheError
from tests.fuzz.seeds import file_of, seeds

Image.init()

# What reading a file, listing a folder and raising an error do by themselves.
HARMLESS = ("mmap.__new__", "os.listdir", "os.scandir", "builtins.id", "object.__getattr__", "sys._getframe",
            "cpython.", "gc.")  # fmt: skip
MOST_GROWTH = (4, 1_000_000)  # a tensor of stride 0 may be larger than the file, by as much as the reader allows

events: list[str] = []
watching = ""  # the folder whose files may be opened, while they are


def watch(event: str, arguments: tuple[object, ...]) -> None:
    if not watching or event.startswith(HARMLESS):
        return
    if event == "open" and str(arguments[0]).startswith(watching) and not int(str(arguments[2])) & os.O_ACCMODE:
        return
    events.append(f"{event} {str(arguments)[:200]}")


def read(path: Path, data: bytes) -> None:
    global watching
    content = file_of(data)
    path.unlink(missing_ok=True)  # a new file: the last one may still be mapped
    path.write_bytes(content)
    watching = str(path.parent)
    try:
        file = open_model(path)
        for name, info in file.tensors.items():
            tensor = file.tensor(name)
            if tuple(tensor.shape) != info.shape or tensor.numel() * tensor.element_size() != info.nbytes:
                raise AssertionError(f"{name!r} is {tuple(tensor.shape)}, and was to be {info}")
            if info.nbytes > MOST_GROWTH[0] * len(content) + MOST_GROWTH[1]:
                raise AssertionError(f"{name!r} takes {info.nbytes} bytes, of a file of {len(content)}")
            tensor.contiguous().view(-1)[:1].tolist()
    except GouacheError as error:
        if "\n" in str(error):
            raise AssertionError("the message has several lines") from error
    finally:
        watching = ""
    if events:
        raise AssertionError(f"reading did more than to read: {events}")


def fuzz(place: Path) -> None:
    """Does not return: libFuzzer ends the process."""
    arguments = list(sys.argv)
    if not any(Path(each).is_file() for each in arguments[1:]):
        begin = place / "seeds"
        begin.mkdir()
        for number, seed in enumerate(seeds()):
            (begin / f"{number:05}").write_bytes(seed)
        arguments.append(str(begin))
        if len([each for each in arguments if not each.startswith("-")]) == 2:
            arguments.insert(1, str(place / "found"))  # or the seeds' folder would get what is found
            (place / "found").mkdir()
    for option, value in (("-max_len", 20_000), ("-timeout", 10), ("-rss_limit_mb", 3000)):
        if not any(each.startswith(f"{option}=") for each in arguments):
            arguments.append(f"{option}={value}")
    (place / "m").mkdir()
    sys.addaudithook(watch)
    atheris.Setup(arguments, lambda data: read(place / "m" / "m.ckpt", data))
    atheris.Fuzz()


def main() -> int:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as place:
        child = os.fork()
        if not child:
            try:
                fuzz(Path(place))
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())

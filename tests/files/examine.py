"""Run as a process of its own: opens the files named on standard input and reports what happened, as JSON.

Every audit event that is not the plain reading of the file itself is reported, so nothing a file asks for can be
looked up, imported, run or opened unseen. torch must not be imported by opening.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path

# All that opening needs is imported before the watch begins.
from gouache.errors import FileError
from gouache.files.open import open_model

watched: list[str] | None = None
current = ""

# What reading a file, listing a folder and raising an error do by themselves.
HARMLESS = {"mmap.__new__", "os.listdir", "os.scandir", "builtins.id"}


def watch(event: str, args: tuple) -> None:
    if watched is None or event in HARMLESS:
        return
    if event == "open" and isinstance(args[0], str) and args[0].startswith(current):
        return
    watched.append(f"{event} {str(args)[:200]}")


def reset_peak() -> None:
    # getrusage would report the parent's peak, which a forked process inherits
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes of memory held at the worst moment since the last reset, 0 where the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    global watched, current
    with suppress(FileError):
        open_model(__file__)
    sys.addaudithook(watch)
    reports = []
    for path in json.load(sys.stdin):
        current, seen = path, []
        reset_peak()
        start = time.process_time()
        watched = seen
        try:
            file = open_model(path)
            watched = None
            verdict, message = "opened", " ".join(file.tensors)
        except FileError as error:
            watched = None
            verdict, message = type(error).__name__, str(error)
        except BaseException as error:
            watched = None
            verdict, message = "CRASH", repr(error)[:500]
        seconds = time.process_time() - start
        reports.append(
            {
                "path": path,
                "verdict": verdict,
                "message": message,
                "seconds": seconds,
                "events": seen[:5],
                "peak": peak(),
            }
        )
    json.dump({"reports": reports, "torch": "torch" in sys.modules}, sys.stdout)


main()

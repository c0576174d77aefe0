"""Runs as a separate process: opens the files listed on standard input and reports the results as JSON.

Every audit event other than reading the file is reported, so a file cannot cause a look-up, import, call or open
without being detected. Opening must not import torch.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path

# Everything that opening needs is imported before auditing begins.
from gouache.errors import FileError
from gouache.files.open import open_model

events: list[str] | None = None
current = ""

# Events of reading a file, listing a folder and raising an error.
HARMLESS = {"mmap.__new__", "os.listdir", "os.scandir", "builtins.id"}


def audit(event: str, args: tuple) -> None:
    if events is None or event in HARMLESS:
        return
    # By its path, then as a file object on the descriptor.
    if event == "open" and (isinstance(args[0], int) or (isinstance(args[0], str) and args[0].startswith(current))):
        return
    events.append(f"{event} {str(args)[:200]}")


def reset_peak() -> None:
    # getrusage would report the parent's peak, which a forked process inherits.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Peak memory in bytes since the last reset; 0 if the system does not report it."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    global events, current
    with suppress(FileError):
        open_model(__file__)
    sys.addaudithook(audit)
    reports = []
    for path in json.load(sys.stdin):
        current, seen = path, []
        reset_peak()
        start = time.process_time()
        events = seen
        try:
            file = open_model(path)
            events = None
            verdict, message = "opened", " ".join(file.tensors)
        except FileError as error:
            events = None
            verdict, message = type(error).__name__, str(error)
        except BaseException as error:
            events = None
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

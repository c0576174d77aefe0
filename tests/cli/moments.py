"""Run as a process of its own: carries out commands in forks of itself, each killed at the moment it is told.

A moment is just before something that the result depends on: a weight is read, a piece is written, flushed or read
back, a file or folder is made, gets its name or another. They come in the same order in every run, so that the n-th
of a kind names one for good. Forks, because importing torch takes seconds and they have it already.

Jobs and answers are lines of JSON on standard input and output.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pkgutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gouache.app.hashes
import gouache.app.names
import gouache.cli
import gouache.cli.main
import gouache.workshop
from gouache.files.source import Source
from gouache.files.write import AtomicOutput

EVENTS = {"os.link": "link", "os.rename": "rename", "os.mkdir": "mkdir"}


def carry_out(job: dict[str, Any]) -> None:
    """The command, in a fork: its output goes to a file, and so does the list of its moments if it ends."""
    sys.argv = ["gouache", *job["arguments"]]
    said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(job["folder"])
    moments: list[tuple[str, int, list[str], int | None]] = []
    counts = Counter[str]()
    stop, target = job["kill"], job["target"]

    def moment(kind: str) -> None:
        if stop == [kind, counts[kind]]:
            os.kill(os.getpid(), signal.SIGKILL)
        counts[kind] += 1
        if stop is not None:
            return
        inode = os.stat(target).st_ino if os.path.exists(target) else None  # noqa: PTH110, PTH116 - often, so quickly
        moments.append((kind, counts[kind] - 1, os.listdir(), inode))  # noqa: PTH208

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS:
            moment(EVENTS[event])
        elif event == "open" and not isinstance(arguments[0], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            moment("create")

    def announced(kind: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def also(*arguments: Any, **more: Any) -> Any:
            moment(kind)
            return work(*arguments, **more)

        return also

    Source.tensor = announced("read", Source.tensor)
    AtomicOutput.write = announced("write", AtomicOutput.write)
    os.fsync = announced("flush", os.fsync)
    hashlib.file_digest = announced("read back", hashlib.file_digest)
    sys.addaudithook(watch)
    code: Any = 0
    try:
        gouache.cli.main.main()
    except SystemExit as ended:
        code = ended.code
    moments_made = json.dumps(moments)
    sys.stdout.flush()
    sys.stderr.flush()
    Path(job["moments"]).write_text(moments_made)
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def preload() -> None:
    """Import what commands import when they are needed."""
    for room in (gouache.cli, gouache.workshop):
        for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            importlib.import_module(module.name)


def serve() -> None:
    preload()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            try:
                carry_out(job)
            finally:
                os._exit(70)  # it ends above, or with a traceback
        # Reaped, or it would still count as a running process.
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


if __name__ == "__main__":
    serve()

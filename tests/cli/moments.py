"""Run as a separate process: runs commands in forks of itself, each sent a signal at a given moment.

A moment is just before an operation that the result depends on: a tensor is read; data is written, flushed or read
back; a file or folder is created, linked or renamed. Their order is the same in every run, so that the n-th of a kind
is always the same one. Forks, because importing torch takes seconds and forks have it already.

Jobs and answers are lines of JSON on standard input and output.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pkgutil
import sys
import traceback
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


def run(job: dict[str, Any]) -> None:
    """Run the command, in a fork: its output goes to a file, and so does the list of its moments if it ends."""
    sys.argv = ["gouache", *job["arguments"]]
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(job["folder"])
    moments: list[tuple[str, int, list[str], int | None]] = []
    counts = Counter[str]()
    stop, target = job["kill"], job["target"]

    def moment(kind: str) -> None:
        nonlocal stop
        if stop == [kind, counts[kind]]:
            stop = [kind, -1]  # one signal, also where its handler raises before the moment is counted
            os.kill(os.getpid(), job["signal"])
        counts[kind] += 1
        if stop is not None:
            return
        inode = os.stat(target).st_ino if os.path.exists(target) else None  # noqa: PTH110, PTH116 - called often; Path is slower
        moments.append((kind, counts[kind] - 1, os.listdir(), inode))  # noqa: PTH208

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS:
            moment(EVENTS[event])
        elif event == "open" and not isinstance(arguments[0], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            moment("create")

    def watched(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            moment(kind)
            return function(*arguments, **options)

        return call

    Source.read_tensor = watched("read", Source.read_tensor)
    AtomicOutput.write = watched("write", AtomicOutput.write)
    os.fsync = watched("flush", os.fsync)
    hashlib.file_digest = watched("read back", hashlib.file_digest)
    sys.addaudithook(watch)
    code: Any = 0
    try:
        gouache.cli.main.main()
    except SystemExit as ended:
        code = ended.code
    listed = json.dumps(moments)  # before the flushes, which may be moments too
    sys.stdout.flush()
    sys.stderr.flush()
    Path(job["moments"]).write_text(listed)
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def preload() -> None:
    """Import what commands import when it is needed."""
    for package in (gouache.cli, gouache.workshop):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def serve() -> None:
    preload()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            try:
                run(job)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(70)  # `run` exits by itself, unless it raises
        # Waited for, or it would remain as a zombie process.
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


if __name__ == "__main__":
    serve()

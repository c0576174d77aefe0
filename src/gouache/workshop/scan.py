"""Scan files: whether they are safe, and what hostile ones would have done.

A scanner that parses a file differently from the loader can be deceived by a file that shows each of them something
else. So both use the same reader: what it opens is safe to open with it, and what it refuses is listed here. Nothing
in a file is run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gouache.errors import DamagedFile, FileError, GouacheError, NotAModel, PickleFinding, UnsafeFile, printable
from gouache.files.content import kind_of
from gouache.files.source import Source
from gouache.workshop import layout
from gouache.workshop.effects import effect_of

Verdict = Literal["safe", "hostile", "suspicious", "damaged", "not a model", "unreadable"]
_LONGEST = 4096  # characters of a path
SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".bin", ".joblib")


@dataclass(frozen=True)
class Intent:
    """A call that a file requests: the function's name, the byte offset, the arguments, and what it would have done."""

    name: str
    byte: int | None
    arguments: tuple[str, ...]
    effect: str


@dataclass(frozen=True)
class Scanned:
    """The `verdict` on the file at `path`, with the `reason` in one line.

    "safe": it was opened and nothing was refused. "hostile": it requests calls, the `intents`. "suspicious": it
    requests no calls, but is built to exhaust or mislead a reader. "damaged", "not a model" and "unreadable" files
    could not be opened; that does not mean that they are safe.
    """

    path: str
    verdict: Verdict
    reason: str
    format: str = ""
    intents: tuple[Intent, ...] = ()


def scan(paths: list[Path]) -> Iterator[Scanned]:
    """A verdict on each file in `paths`; in folders, on each file that holds weights or a pickle, whatever its name."""
    for path in paths:
        if not _is_folder(path):
            yield _scan_file(path)
            continue
        for file in _files(path):
            if isinstance(file, FileError):
                yield Scanned(printable(str(file.path), _LONGEST), "unreadable", _reason(file))
            else:
                yield _scan_file(file)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False  # the error of opening it says why


def _files(folder: Path) -> Iterator[Path | FileError]:
    """Files in and below `folder`, sorted by name, that have a model's extension or start like a model file.

    Links to folders are not followed. A folder that cannot be searched is given as its error.
    """
    # Not os.walk, which calls itself for each level: folders can be nested deeper than Python's stack.
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(here) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            yield FileError(here, f"cannot be searched: {error.strerror}")
            continue
        inner = []
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                inner.append(path)
            elif (path.suffix.lower() in SUFFIXES and not _is_folder(path)) or _starts_like_a_model(path):
                yield path
        waiting += reversed(inner)


def _starts_like_a_model(path: Path) -> bool:
    try:
        return kind_of(Source(path)) in ("pickle", "safetensors")
    except (GouacheError, OSError):
        return False


def _scan_file(path: Path) -> Scanned:
    shown = printable(str(path), _LONGEST)
    try:
        file = layout.open_for_report(path)
    except UnsafeFile as error:
        verdict: Verdict = "hostile" if error.calls else "suspicious"
        intents = tuple(_intent(each) for each in error.calls)
        return Scanned(shown, verdict, _reason(error), intents=intents)
    except DamagedFile as error:
        return Scanned(shown, "damaged", _reason(error))
    except NotAModel as error:
        return Scanned(shown, "not a model", _reason(error))
    except FileError as error:
        return Scanned(shown, "unreadable", _reason(error))
    pickled = file.format.startswith(("torch", "pickle"))
    reason = "a pickle of tensors and plain values only" if pickled else "its format cannot hold code"
    return Scanned(shown, "safe", reason, file.format)


def _intent(asked: PickleFinding) -> Intent:
    arguments = tuple(printable(each) for each in asked.arguments)
    return Intent(printable(asked.name), asked.byte, arguments, effect_of(asked.name))


def _reason(error: FileError) -> str:
    return printable(str(error).removeprefix(f"{printable(str(error.path))}: "), 600)

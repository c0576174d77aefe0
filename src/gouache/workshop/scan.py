"""Is a file safe, and if not, what would it have done? Told by the same reader that would load it.

A scanner that reads a file otherwise than the loader can be shown another file than the loader. So there is one
reader: what it opens is safe to open with it, and what it refuses it lists. Nothing is run either way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gouache.errors import Asked, DamagedFile, FileError, GouacheError, NotAModel, UnsafeFile, printable
from gouache.files.content import kind_of
from gouache.files.open import open_model
from gouache.files.source import Source
from gouache.workshop.effects import effect_of

Verdict = Literal["safe", "hostile", "suspicious", "damaged", "no model", "unreadable"]
SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".bin", ".joblib")


@dataclass(frozen=True)
class Intent:
    """A call that a file asked for: its name, the byte, what it was to be handed, and what it would have done."""

    name: str
    byte: int | None
    arguments: tuple[str, ...]
    effect: str


@dataclass(frozen=True)
class Scanned:
    """`verdict` on the file at `path`; `reason` in one line.

    "safe": opened, nothing refused; `mentions` are unknown names that it holds as mere values. "hostile": it asks for
    calls, the `intents`. "suspicious": no call, but built to exhaust or mislead a reader. "damaged", "no model" and
    "unreadable" files could not be opened for the reason given, and are not cleared by that.
    """

    path: str
    verdict: Verdict
    reason: str
    format: str = ""
    intents: tuple[Intent, ...] = ()
    mentions: tuple[str, ...] = ()


def scan(paths: list[Path]) -> Iterator[Scanned]:
    """A verdict on every file of `paths`; of folders, on all that hold weights or pickles, however they are called."""
    for path in paths:
        if not path.is_dir():
            yield _scan_file(path)
            continue
        for file in _files(path):
            yield _scan_file(file)


def _files(folder: Path) -> Iterator[Path]:
    """Files below `folder` in name order that are called like models, or begin like one."""
    for where, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(where, name)
            if path.suffix.lower() in SUFFIXES or _begins_like_a_pickle(path):
                yield path


def _begins_like_a_pickle(path: Path) -> bool:
    try:
        return kind_of(Source(path)) in ("pickle", "safetensors")
    except (GouacheError, OSError):
        return False


def _scan_file(path: Path) -> Scanned:
    shown = printable(str(path))
    try:
        file = open_model(path)
    except UnsafeFile as error:
        verdict: Verdict = "hostile" if error.asked else "suspicious"
        intents = tuple(_intent(each) for each in error.asked)
        return Scanned(shown, verdict, _reason(error), intents=intents, mentions=tuple(n.name for n in error.named))
    except DamagedFile as error:
        return Scanned(shown, "damaged", _reason(error))
    except NotAModel as error:
        return Scanned(shown, "no model", _reason(error))
    except FileError as error:
        return Scanned(shown, "unreadable", _reason(error))
    mentions = tuple(note for note in file.notes if note.startswith("its pickle mentions"))
    pickled = file.format.startswith(("torch", "pickle"))
    reason = "a pickle that asks for nothing but tensors and plain values" if pickled else "holds no code by its format"
    return Scanned(shown, "safe", reason, file.format, mentions=mentions)


def _intent(asked: Asked) -> Intent:
    arguments = tuple(printable(each) for each in asked.arguments)
    return Intent(printable(asked.name), asked.byte, arguments, effect_of(asked.name))


def _reason(error: FileError) -> str:
    return str(error).removeprefix(f"{printable(str(error.path))}: ")

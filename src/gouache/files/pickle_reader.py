"""One pickle read from front to back: opcodes run on the machine, its verdict given, its value handed on as a graph."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gouache.errors import Asked, DamagedFile, UnsafeFile, printable
from gouache.files.pickle_machine import (
    MAX_BYTES,
    MAX_STEPS,
    Broken,
    Exhausted,
    Machine,
    Name,
    Persistent,
    Unsafe,
    Vocabulary,
)
from gouache.files.pickle_opcodes import OPERATIONS, STOP


@dataclass(frozen=True)
class Parsed:
    """The pickle's value as a graph; the byte after it; every `Persistent` in it; unknown names it only mentions."""

    value: Any
    end: int
    persistent: list[Persistent] = field(repr=False)
    mentioned: tuple[Name, ...] = ()


def interpret(
    path: Path, data: bytes | mmap.mmap, start: int, end: int, vocabulary: Vocabulary, budget: int = MAX_BYTES
) -> Parsed:
    """Walks the pickle that begins at byte `start` and must end before `end`, within `budget` bytes.

    Raises UnsafeFile for a forbidden call or a spent budget, DamagedFile for bytes that are no pickle.
    """
    machine = Machine(data, start, min(end, start + budget), vocabulary)
    try:
        value = _run(machine)
    except (Broken, Unsafe) as error:
        _refuse(path, machine)
        if isinstance(error, Unsafe):
            raise UnsafeFile(path, f"its pickle {error} (byte {machine.at}): refused") from None
        if isinstance(error, Exhausted) and machine.end < end:
            raise UnsafeFile(path, f"its pickle is longer than {budget:,} bytes: refused") from None
        raise DamagedFile(path, f"its pickle {error} (byte {machine.at}): damaged, or no pickle") from None
    _refuse(path, machine)
    mentioned = tuple(name for name in machine.names if not machine.known(name))
    return Parsed(value, machine.position, machine.persistent, mentioned)


def _run(machine: Machine) -> Any:
    data, end, operations = machine.data, machine.end, OPERATIONS
    for _ in range(MAX_STEPS):
        at = machine.at = machine.position
        if at >= end:
            raise Exhausted("ends without a STOP")
        machine.position = at + 1
        code = data[at]
        if code == STOP:
            return machine.pop()
        operation = operations.get(code)
        if operation is None:
            raise Broken(f"has the unknown opcode 0x{code:02x}")
        operation(machine)
    raise Unsafe(f"takes more than {MAX_STEPS:,} steps")


def _refuse(path: Path, machine: Machine) -> None:
    """Raises if the pickle asked for anything forbidden; the message lists all of it with byte positions."""
    if not machine.refused:
        return
    asked = tuple(Asked(what, at, machine.arguments.get(what, ())) for what, at in machine.refused.items())
    named = tuple(
        Asked(str(name), at)
        for name, at in machine.names.items()
        if not machine.known(name) and str(name) not in machine.refused
    )
    also = f"; it also names {_listed(named)}" if named else ""
    raise UnsafeFile(
        path,
        f"asks for code to be run, and nothing was run: {_listed(asked)}{also}. "
        "Weights need no code: get a .safetensors file instead",
        asked,
        named,
    )


def _listed(asked: tuple[Asked, ...], most: int = 6) -> str:
    items = [f"{printable(each.name, 80)} (byte {each.byte})" for each in asked]
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")

"""Reads one pickle from front to back: runs its opcodes on `Machine`, refuses forbidden calls, returns its graph."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gouache.errors import DamagedFile, PickleFinding, UnsafeFile, printable
from gouache.files.pickle_machine import (
    MAX_BYTES,
    MAX_STEPS,
    AllowList,
    Machine,
    Malformed,
    Persistent,
    Truncated,
    Unsafe,
)
from gouache.files.pickle_opcodes import OPERATIONS, STOP


@dataclass(frozen=True)
class Parsed:
    """The pickle's value as a graph; the byte after it; every `Persistent` in it."""

    value: Any
    end: int
    persistent: list[Persistent] = field(repr=False)


def interpret(
    path: Path, data: bytes | mmap.mmap, start: int, end: int, allow_list: AllowList, budget: int = MAX_BYTES
) -> Parsed:
    """Reads the pickle that begins at byte `start` and must end before `end`, within `budget` bytes.

    Raises UnsafeFile for a forbidden name, call or state or an exceeded limit, DamagedFile for bytes that are not a
    valid pickle.
    """
    machine = Machine(data, start, min(end, start + budget), allow_list)
    try:
        value = _run(machine)
    except (Malformed, Unsafe) as error:
        _refuse(path, machine)
        if isinstance(error, Unsafe):
            raise UnsafeFile(path, f"its pickle {error} (byte {machine.at}): refused") from None
        if isinstance(error, Truncated) and machine.end < end:
            raise UnsafeFile(path, f"its pickle is longer than {budget:,} bytes: refused") from None
        raise DamagedFile(path, f"its pickle {error} (byte {machine.at}): damaged, or not a pickle") from None
    _refuse(path, machine)
    return Parsed(value, machine.position, machine.persistent)


def _run(machine: Machine) -> Any:
    data, end, operations = machine.data, machine.end, OPERATIONS
    for _ in range(MAX_STEPS):
        at = machine.at = machine.position
        if at >= end:
            raise Truncated("ends without a STOP")
        machine.position = at + 1
        code = data[at]
        if code == STOP:
            return machine.pop()
        operation = operations.get(code)
        if operation is None:
            raise Malformed(f"has the unknown opcode 0x{code:02x}")
        operation(machine)
    raise Unsafe(f"has more than {MAX_STEPS:,} opcodes")


def _refuse(path: Path, machine: Machine) -> None:
    """Raises UnsafeFile if the pickle contains anything forbidden; the message lists all of it with byte positions."""
    if not machine.refused:
        return
    calls = tuple(PickleFinding(what, at, machine.arguments.get(what, ())) for what, at in machine.refused.items())
    raise UnsafeFile(
        path,
        f"tries to run code (nothing was run): {_listed(calls)}. Weights need no code: get a .safetensors file instead",
        calls,
    )


def _listed(found: tuple[PickleFinding, ...], most: int = 6) -> str:
    items = [f"{printable(each.name, 80)} (byte {each.byte})" for each in found]
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")

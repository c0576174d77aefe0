"""The stack machine that a pickle is a program for, without the ability to import or call anything.

A pickle can import any Python object (a "global") and call it. Here a global is a `Global`, two strings that are never
looked up, and a call is a `Call`, a record of what would be called with what. `pickle_allow_list` computes the results
of allowed calls. A file that names any other global is refused, but only after the whole pickle has been read, so that
the message can list everything the pickle would have called.

The verdict is about any loader, not about this one. Python imports a global when it is only named; it calls an
attribute `__setstate__` that an earlier state gave to an object (by a second BUILD), or that a dictionary with
attribute access finds among its entries. So a global outside the allow-list is refused wherever it occurs, and so are a
second state for one object, the name `__setstate__`, and special names (`__class__`) in a state.

Every step takes bounded time and memory: lengths are checked against the remaining bytes before anything is
allocated, and there are limits on opcodes, text and number keys. The opcodes themselves are in `pickle_opcodes`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from gouache.errors import printable

MAX_BYTES = 64_000_000  # of one pickle
MAX_STEPS = 1_000_000  # opcodes of one pickle; about 40 per tensor, hence 25,000 tensors
MAX_TEXT = 96_000_000  # bytes of memory for all text, bytes and numbers of one pickle
MAX_NUMBER_KEYS = 10_000  # numbers can be chosen to collide as dictionary keys; real files use parameter indexes
MAX_NAME = 500  # characters of a module or class name
_MAX_REPORTED = 100
_MAX_SHOWN = 4  # arguments shown of a refused call


@dataclass(frozen=True, slots=True)
class Global:
    """A global: an object of a Python module, as the pickle names it. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


SET = Global("builtins", "set")
FROZEN_SET = Global("builtins", "frozenset")


@dataclass(eq=False, slots=True)
class Call:
    """The pickle calls `name(*args)`, then gives the result a state, entries or elements. The call is never made."""

    name: Global
    args: tuple[Any, ...]
    state: Any = None
    entries: dict[Any, Any] | None = None
    elements: list[Any] | None = None
    built: bool = False  # it was given a state


@dataclass(eq=False, slots=True)
class Persistent:
    """A reference by the persistent id `id` to something outside the pickle; for tensors, to a storage."""

    id: Any


@dataclass(frozen=True)
class AllowList:
    """The allow-list: `functions` may be called; `classes` may be called and given a state or contents."""

    functions: Container[Global]
    classes: Container[Global]
    values: Container[Global] = ()  # may be imported but not called
    checks: Mapping[Global, Callable[[Call], str]] = field(default_factory=dict)
    """What is wrong with a call, its arguments and state; "" if nothing. For calls that are safe in some forms only."""


class Malformed(Exception):
    """The bytes are not a valid pickle. The text completes 'its pickle ...'."""


class Truncated(Malformed):
    """The bytes end before the pickle does."""


class Unsafe(Exception):
    """The pickle exceeds what weights need. The text completes 'its pickle ...'."""


class Machine:
    def __init__(self, data: bytes | mmap.mmap, start: int, end: int, allow_list: AllowList) -> None:
        self.data = data
        self.position = self.at = start  # position of the next byte; position of the current opcode
        self.end = end
        self.allow_list = allow_list
        self.stack: list[Any] = []
        self.metastack: list[list[Any]] = []  # the stacks below each open mark, named as in CPython
        self.memo: dict[int, Any] = {}
        self.refused: dict[str, int] = {}  # everything forbidden, with the byte where it first occurs
        self.arguments: dict[str, tuple[str, ...]] = {}  # arguments of refused calls, as text
        self.persistent: list[Persistent] = []
        self.frame_end = 0
        self.text = 0
        self.number_keys = 0

    # ---- reading the program

    def read(self, count: int) -> bytes:
        if count > self.end - self.position:
            raise Truncated(f"announces {count} bytes, but {self.end - self.position} are left")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, width: int) -> int:
        return int.from_bytes(self.read(width), "little")

    def line_length(self, longest: int) -> int:
        stop = self.data.find(b"\n", self.position, min(self.end, self.position + longest + 1))
        if stop < 0:
            raise Truncated("has a line without an end")
        return stop - self.position

    def line(self, longest: int) -> bytes:
        line = self.content(self.line_length(longest))
        self.position += 1
        return line

    def content(self, count: int) -> bytes:
        """`count` bytes that become a value, counted towards MAX_TEXT before they are decoded."""
        raw = self.read(count)
        self.text += 64 + (count if raw.isascii() else 4 * count)  # one wide character makes Python store all as wide
        if self.text > MAX_TEXT:
            raise Unsafe(f"holds more than {MAX_TEXT:,} bytes of text and numbers")
        return raw

    # ---- the stack

    def pop(self) -> Any:
        if not self.stack:
            raise Malformed("pops from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise Malformed("reads the top of an empty stack")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        if not self.metastack:
            raise Malformed("pops to a mark that was never set")
        items, self.stack = self.stack, self.metastack.pop()
        return items

    # ---- globals and calls

    def is_allowed(self, name: Global) -> bool:
        allowed = self.allow_list
        return name in allowed.functions or name in allowed.classes or name in allowed.values

    def refuse(self, what: str) -> None:
        if len(self.refused) < _MAX_REPORTED:
            self.refused.setdefault(what, self.at)

    def push_global(self, module: str, name: str) -> None:
        if not module or not name or len(module) > MAX_NAME or len(name) > MAX_NAME:
            raise Malformed("has the name of a global that is empty or too long")
        found = Global(module, name)
        # Also if it is only named: another loader imports its module, and could call it.
        if not self.is_allowed(found):
            self.refuse(str(found))
        self.stack.append(found)

    def push_text(self, text: str | bytes) -> None:
        if text in _SET_STATE:
            self.refuse("the name __setstate__")
        self.stack.append(text)

    def call(self, name: Any, args: Any, *, function: bool) -> None:
        """Pushes a `Call` of `name(*args)`; `function` tells a call (REDUCE) from a creation by `__new__` (NEWOBJ)."""
        if not isinstance(args, tuple):
            raise Malformed("makes a call whose arguments are not a tuple")
        if not isinstance(name, Global):
            self.refuse("a call of something that is not a global")
            name = Global("unknown", "unknown")
        elif name not in self.allow_list.classes and not (function and name in self.allow_list.functions):
            if str(name) in self.refused and str(name) not in self.arguments:
                self.refused[str(name)] = self.at  # the call is more telling than the name
            self.refuse(str(name))
            self.arguments.setdefault(str(name), tuple(argument_text(value) for value in args[:_MAX_SHOWN]))
        made = Call(name, args)
        self.check(made)
        self.stack.append(made)

    def check(self, call: Call) -> None:
        if (check := self.allow_list.checks.get(call.name)) is not None and (fault := check(call)):
            self.refuse(f"{call.name} {fault}")

    def build(self, state: Any, target: Any) -> None:
        """Gives the object `target` its state, once."""
        if not isinstance(target, Call) or (
            target.name not in self.allow_list.classes and str(target.name) not in self.refused
        ):
            self.refuse(f"a state for {type_label(target)}")
            return
        if target.built:
            self.refuse(f"a second state for {type_label(target)}")
        for name in _state_names(state):
            if isinstance(name, str | bytes) and name[:2] in ("__", b"__"):
                self.refuse(f"a state for {type_label(target)} with {argument_text(name)}")
        target.state, target.built = state, True
        self.check(target)

    def container(self, kind: type) -> Call | Any:
        """The dictionary, list or object on top of the stack that receives entries or elements."""
        target = self.top()
        if isinstance(target, Call) and target.name in self.allow_list.classes:
            return target
        if not isinstance(target, kind):
            self.refuse(f"entries for {type_label(target)}")
            return kind()
        return target

    def set_entries(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise Malformed("has a key without a value")
        target = self.container(dict)
        if isinstance(target, Call):
            target.entries = target = {} if target.entries is None else target.entries
        for key, value in zip(items[::2], items[1::2]):
            self.check_key(key)
            target[key] = value

    def add_elements(self, items: list[Any]) -> None:
        target = self.container(list)
        if isinstance(target, Call):
            target.elements = target = [] if target.elements is None else target.elements
        target.extend(items)

    def check_key(self, key: Any) -> None:
        """Keys must hash in constant time, which nested tuples do not."""
        kind = type(key)
        if kind is int or kind is float:
            self.number_keys += 1
            if self.number_keys > MAX_NUMBER_KEYS:
                raise Unsafe(f"uses more than {MAX_NUMBER_KEYS:,} numbers as dictionary keys")
        elif kind not in (str, bytes, bool, type(None), Global):
            raise Unsafe(f"uses {type_label(key)} as a dictionary key")


_SET_STATE = ("__setstate__", b"__setstate__")


def _state_names(state: Any) -> list[Any]:
    """The attributes that a state sets: those of a dictionary of any class, or of a pair of two."""
    names: list[Any] = []
    for part in state if isinstance(state, tuple) else (state,):
        for item in (part, *part.args, part.entries) if isinstance(part, Call) else (part,):
            if isinstance(item, dict):
                names += item
            elif isinstance(item, list):  # pairs
                names += [pair[0] for pair in item if isinstance(pair, tuple | list) and pair]
    return names


def argument_text(value: Any) -> str:
    """A plain value as text, shortened; for any other value, the name of its type."""
    if isinstance(value, str | bytes):
        return printable(value if isinstance(value, str) else value[:200].decode("utf-8", "replace"))
    return str(value) if isinstance(value, bool | float) or value is None else type_label(value)


def type_label(value: Any) -> str:
    """How a message refers to `value`. Never its `repr`: that of a cyclic or nested graph may be endless."""
    if isinstance(value, Global | Call):
        return printable(str(value if isinstance(value, Global) else value.name), 80)
    return type(value).__name__.lower()

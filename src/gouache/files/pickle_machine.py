"""The machine that a pickle is a program for, with its dangerous power taken out.

A pickle can name any Python object and call it. Here a name is a `Name`, two strings, and a call is a `Call`, a note
that one was asked for; what an honest note means is decided by `pickle_values` from a fixed table. A call of any
name outside the table gets the file refused, once the whole pickle was walked, so that the message can list all that
it asked for.

Every step takes bounded time and memory: lengths are checked against the bytes that are left before anything is
allocated, and steps, text and number keys have budgets. The opcodes themselves are in `pickle_opcodes`.
"""

from __future__ import annotations

import mmap
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from gouache.errors import printable

MAX_BYTES = 64_000_000  # of one pickle
MAX_STEPS = 1_000_000  # opcodes of one pickle; some 40 a tensor, so 25,000 tensors
MAX_TEXT = 96_000_000  # bytes of memory for all text, bytes and numbers of one pickle
MAX_NUMBER_KEYS = 10_000  # numbers can be chosen to collide as dictionary keys; honest keys are parameter indexes
MAX_NAME = 500  # characters of a module or class name
_MAX_REPORTED = 100
_MAX_SHOWN = 4  # arguments of a refused call


@dataclass(frozen=True, slots=True)
class Name:
    """Something in some Python module, as the pickle names it. Nobody looks it up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


SET = Name("builtins", "set")
FROZEN_SET = Name("builtins", "frozenset")


@dataclass(eq=False, slots=True)
class Call:
    """The pickle asks for `name(*args)`, then gives the result a state, entries or elements. Nobody does it."""

    name: Name
    args: tuple[Any, ...]
    state: Any = None
    entries: dict[Any, Any] | None = None
    elements: list[Any] | None = None


@dataclass(eq=False, slots=True)
class Persistent:
    """A reference to something outside the pickle, for tensors a storage, by the identifier `id`."""

    id: Any


@dataclass(frozen=True)
class Vocabulary:
    """What a pickle may ask for: `functions` may be called, `classes` also be given a state or contents."""

    functions: Container[Name]
    classes: Container[Name]
    values: Container[Name] = ()  # may be named, nothing more; other names are allowed too, but reported


class Broken(Exception):
    """The bytes are no pickle. The text completes 'its pickle ...'."""


class Exhausted(Broken):
    """The bytes end before the pickle does."""


class Unsafe(Exception):
    """The pickle asks for more than weights need. The text completes 'its pickle ...'."""


class Machine:
    def __init__(self, data: bytes | mmap.mmap, start: int, end: int, vocabulary: Vocabulary) -> None:
        self.data = data
        self.position = self.at = start  # of the next byte; of the opcode being done
        self.end = end
        self.vocabulary = vocabulary
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}
        self.names: dict[Name, int] = {}  # every name met, and where first
        self.refused: dict[str, int] = {}  # what must not be, and where first
        self.arguments: dict[str, tuple[str, ...]] = {}  # what refused calls were to be handed, as far as it is plain
        self.persistent: list[Persistent] = []
        self.text = 0
        self.number_keys = 0

    # ---- reading the program

    def take(self, count: int) -> bytes:
        if count > self.end - self.position:
            raise Exhausted(f"announces {count} bytes where {self.end - self.position} are left")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line_length(self, longest: int) -> int:
        stop = self.data.find(b"\n", self.position, min(self.end, self.position + longest + 1))
        if stop < 0:
            raise Exhausted("has a line without an end")
        return stop - self.position

    def line(self, longest: int) -> bytes:
        line = self.content(self.line_length(longest))
        self.position += 1
        return line

    def content(self, count: int) -> bytes:
        """`count` bytes that become a value of the program, charged to its budget before they are decoded."""
        raw = self.take(count)
        self.text += 64 + (count if raw.isascii() else 4 * count)  # one wide character widens all the others
        if self.text > MAX_TEXT:
            raise Unsafe(f"holds more than {MAX_TEXT:,} bytes of text and numbers")
        return raw

    # ---- the stack

    def pop(self) -> Any:
        if not self.stack:
            raise Broken("takes from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise Broken("looks at an empty stack")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        if not self.marked:
            raise Broken("goes back to a mark that was never set")
        items, self.stack = self.stack, self.marked.pop()
        return items

    # ---- names and calls

    def known(self, name: Name) -> bool:
        words = self.vocabulary
        return name in words.functions or name in words.classes or name in words.values

    def refuse(self, what: str) -> None:
        if len(self.refused) < _MAX_REPORTED:
            self.refused.setdefault(what, self.at)

    def push_name(self, module: str, name: str) -> None:
        if not module or not name or len(module) > MAX_NAME or len(name) > MAX_NAME:
            raise Broken("has a name that is empty or too long")
        found = Name(module, name)
        self.names.setdefault(found, self.at)
        if "." in name:  # a path through attributes, with which anything can be reached
            self.refuse(str(found))
        self.stack.append(found)

    def call(self, name: Any, args: Any, *, function: bool) -> None:
        """Pushes the note that `name(*args)` was asked for; a `function` is called, a class made by `__new__`."""
        if not isinstance(args, tuple):
            raise Broken("calls with arguments that are no tuple")
        if not isinstance(name, Name):
            self.refuse("a call of something that is no name")
            name = Name("unknown", "unknown")
        elif name not in self.vocabulary.classes and not (function and name in self.vocabulary.functions):
            self.refuse(str(name))
            self.arguments.setdefault(str(name), tuple(shown(value) for value in args[:_MAX_SHOWN]))
        self.stack.append(Call(name, args))

    def container(self, kind: type) -> Call | Any:
        """The dictionary, list or object on top of the stack that is to be filled."""
        target = self.top()
        if isinstance(target, Call) and target.name in self.vocabulary.classes:
            return target
        if not isinstance(target, kind):
            self.refuse(f"entries for a {noun(target)}")
            return kind()
        return target

    def set_entries(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise Broken("has a key without a value")
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
        """Keys must hash in constant time: a tuple of tuples of tuples need not."""
        kind = type(key)
        if kind is int or kind is float:
            self.number_keys += 1
            if self.number_keys > MAX_NUMBER_KEYS:
                raise Unsafe(f"uses more than {MAX_NUMBER_KEYS:,} numbers as dictionary keys")
        elif kind not in (str, bytes, bool, type(None), Name):
            raise Unsafe(f"uses a {noun(key)} as a dictionary key")


def shown(value: Any) -> str:
    """A plain value as text, cut short; of anything else, what it is."""
    if isinstance(value, str | bytes):
        return printable(value if isinstance(value, str) else value[:200].decode("utf-8", "replace"))
    return str(value) if isinstance(value, bool | float) or value is None else noun(value)


def noun(value: Any) -> str:
    """What to call `value` in a message. Never its `repr`: that of a graph may be endless."""
    if isinstance(value, Name | Call):
        return printable(str(value if isinstance(value, Name) else value.name), 80)
    return type(value).__name__.lower()

"""The opcodes of pickle, each a bounded step on `pickle_machine.Machine`.

Opcodes that reach outside the pickle are refused: the extension registry, out-of-band buffers, and text persistent
ids, which PyTorch never wrote. Source: CPython's Lib/pickletools.py.
"""

from __future__ import annotations

import codecs
import re
import struct
from collections.abc import Callable
from typing import Any

from gouache.files.pickle_machine import (
    FROZEN_SET,
    MAX_BYTES,
    MAX_NAME,
    MAX_STEPS,
    SET,
    Call,
    Global,
    Machine,
    Malformed,
    Persistent,
    Truncated,
    Unsafe,
    type_label,
)

STOP = ord(".")

_Operation = Callable[[Machine], None]


def _push(value: Any) -> _Operation:
    return lambda m: m.stack.append(value)


def _skip(width: int) -> _Operation:
    def operation(m: Machine) -> None:
        m.read(width)

    return operation


def _read(width: int, make: Callable[[bytes], Any]) -> _Operation:
    """Pushes a value made from the next `width` bytes."""
    return lambda m: m.stack.append(make(m.read(width)))


def _counted(width: int, make: Callable[[bytes], Any]) -> _Operation:
    """Pushes a value made from n bytes, where n is a number of `width` bytes before them."""
    return lambda m: m.stack.append(make(m.content(m.number(width))))


def _counted_text(width: int, make: Callable[[bytes], str | bytes]) -> _Operation:
    return lambda m: m.push_text(make(m.content(m.number(width))))


def _frame(m: Machine) -> None:
    """The length of a frame. Loaders read a frame at once, so the file must have all of it."""
    length = m.number(8)
    if length > m.end - m.position:
        raise Truncated(f"announces a frame of {length} bytes, but {m.end - m.position} are left")
    if m.position < m.frame_end:
        raise Malformed("begins a frame inside another one")
    m.frame_end = m.position + length


def _tuple_of(count: int) -> _Operation:
    def operation(m: Machine) -> None:
        if len(m.stack) < count:
            raise Malformed("pops from an empty stack")
        items = tuple(m.stack[-count:])
        del m.stack[-count:]
        m.stack.append(items)

    return operation


def _mark(m: Machine) -> None:
    m.metastack.append(m.stack)
    m.stack = []


def _pop(m: Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.pop_to_mark()


def _pop_mark(m: Machine) -> None:
    m.pop_to_mark()


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise Malformed("has text that is not UTF-8") from None


def _old_text(raw: bytes) -> str | bytes:
    """A Python 2 string: text if it is valid UTF-8, else bytes."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


_ESCAPE = re.compile(rb"\\(?:x([0-9a-f]{2})|(.))", re.DOTALL)
_ESCAPED = {b"\\": b"\\", b"'": b"'", b'"': b'"', b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def _quoted(raw: bytes) -> str | bytes:
    """A Python 2 string as written by Python 2's `repr`."""
    if len(raw) < 2 or raw[:1] not in (b"'", b'"') or raw[-1:] != raw[:1]:
        raise Malformed("has a string without quotes")
    try:
        plain = _ESCAPE.sub(lambda m: bytes.fromhex(m[1].decode()) if m[1] else _ESCAPED[m[2]], raw[1:-1])
    except KeyError:
        raise Malformed("has a string with an unknown escape") from None
    return _old_text(plain)


def _raw_unicode(raw: bytes) -> str:
    try:
        return codecs.raw_unicode_escape_decode(raw)[0]
    except UnicodeDecodeError:
        raise Malformed("has text with an invalid escape") from None


def _long(raw: bytes) -> int:
    if len(raw) > 32:
        raise Unsafe("holds a number of more than 32 bytes")
    return int.from_bytes(raw, "little", signed=True)


def _decimal(m: Machine) -> None:
    line = m.line(80)
    if line in (b"00", b"01"):  # booleans of protocol 0
        m.stack.append(line == b"01")
        return
    try:
        m.stack.append(int(line.removesuffix(b"L")))
    except ValueError:
        raise Malformed("has an invalid number") from None


def _decimal_fraction(m: Machine) -> None:
    try:
        m.stack.append(float(m.line(80)))
    except ValueError:
        raise Malformed("has an invalid number") from None


def _line_text(make: Callable[[bytes], str | bytes]) -> _Operation:
    def operation(m: Machine) -> None:
        m.push_text(make(m.content(m.line_length(MAX_BYTES))))
        m.position += 1

    return operation


def _put(m: Machine, index: int) -> None:
    value = m.top()  # first: text that begins with `r` is no pickle, and is not to be called one that is unsafe
    if not 0 <= index < MAX_STEPS:
        raise Unsafe(f"uses a memo index of {MAX_STEPS:,} or more")
    m.memo[index] = value


def _get(m: Machine, index: int) -> None:
    if index not in m.memo:
        raise Malformed(f"gets memo entry {index}, which was never put")
    m.stack.append(m.memo[index])


def _index(m: Machine) -> int:
    line = m.line(12)
    if not line.isdigit():
        raise Malformed("has a memo index that is not a number")
    return int(line)


def _append(m: Machine) -> None:
    value = m.pop()
    m.add_elements([value])


def _appends(m: Machine) -> None:
    items = m.pop_to_mark()
    m.add_elements(items)


def _set_item(m: Machine) -> None:
    value, key = m.pop(), m.pop()
    m.set_entries([key, value])


def _set_items(m: Machine) -> None:
    items = m.pop_to_mark()
    m.set_entries(items)


def _dictionary(m: Machine) -> None:
    items = m.pop_to_mark()
    m.stack.append({})
    m.set_entries(items)


def _list(m: Machine) -> None:
    items = m.pop_to_mark()  # first, because it changes which stack is current
    m.stack.append(items)


def _tuple(m: Machine) -> None:
    items = m.pop_to_mark()
    m.stack.append(tuple(items))


def _frozen_set(m: Machine) -> None:
    items = m.pop_to_mark()
    m.stack.append(Call(FROZEN_SET, (items,)))


def _global(m: Machine) -> None:
    m.push_global(_text(m.line(MAX_NAME)), _text(m.line(MAX_NAME)))


def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise Malformed("has the name of a global that is not text")
    m.push_global(module, name)


def _reduce(m: Machine) -> None:
    args, name = m.pop(), m.pop()
    m.call(name, args, function=True)


def _new_object(m: Machine) -> None:
    args, name = m.pop(), m.pop()
    m.call(name, args, function=False)


def _new_object_with_keywords(m: Machine) -> None:
    keywords, args, name = m.pop(), m.pop(), m.pop()
    if keywords != {}:
        m.refuse(f"keyword arguments for {type_label(name)}")
    m.call(name, args, function=False)


def _old_instance(m: Machine) -> None:
    _global(m)
    name = m.pop()
    m.call(name, tuple(m.pop_to_mark()), function=False)


def _old_object(m: Machine) -> None:
    items = m.pop_to_mark()
    if not items:
        raise Malformed("makes an object without a class")
    m.call(items[0], tuple(items[1:]), function=False)


def _build(m: Machine) -> None:
    state, target = m.pop(), m.top()
    m.build(state, target)


def _persistent(m: Machine) -> None:
    id_ = m.pop()
    if isinstance(id_, tuple) and len(id_) == 4 and id_[0] == "module" and isinstance(id_[1], Global):
        m.stack.append(id_[1])  # how torch's legacy format names a module's class, with its source text
        return
    found = Persistent(id_)
    m.persistent.append(found)
    m.stack.append(found)


def _refused(what: str, width: int = 0) -> _Operation:
    def operation(m: Machine) -> None:
        m.refuse(f"{what} {m.number(width)}" if width else what)
        m.stack.append(None)

    return operation


def _refused_text_id(m: Machine) -> None:
    m.line(MAX_NAME)
    m.refuse("a persistent id of protocol 0")
    m.stack.append(None)


# Every opcode except STOP, in the order of the protocols.
OPERATIONS: dict[int, _Operation] = {
    ord(code): operation
    for code, operation in {
        "(": _mark,
        "0": _pop,
        "1": _pop_mark,
        "2": lambda m: m.stack.append(m.top()),
        "F": _decimal_fraction,
        "I": _decimal,
        "J": _read(4, lambda raw: int.from_bytes(raw, "little", signed=True)),
        "K": _read(1, lambda raw: raw[0]),
        "L": _decimal,
        "M": _read(2, lambda raw: int.from_bytes(raw, "little")),
        "N": _push(None),
        "P": _refused_text_id,
        "Q": _persistent,
        "R": _reduce,
        "S": _line_text(_quoted),
        "T": _counted_text(4, _old_text),
        "U": _counted_text(1, _old_text),
        "V": _line_text(_raw_unicode),
        "X": _counted_text(4, _text),
        "a": _append,
        "b": _build,
        "c": _global,
        "d": _dictionary,
        "}": lambda m: m.stack.append({}),
        "e": _appends,
        "g": lambda m: _get(m, _index(m)),
        "h": lambda m: _get(m, m.number(1)),
        "i": _old_instance,
        "j": lambda m: _get(m, m.number(4)),
        "l": _list,
        "]": lambda m: m.stack.append([]),
        "o": _old_object,
        "p": lambda m: _put(m, _index(m)),
        "q": lambda m: _put(m, m.number(1)),
        "r": lambda m: _put(m, m.number(4)),
        "s": _set_item,
        "t": _tuple,
        ")": _push(()),
        "u": _set_items,
        "G": _read(8, lambda raw: struct.unpack(">d", raw)[0]),
        # protocol 2
        "\x80": _skip(1),
        "\x81": _new_object,
        "\x82": _refused("extension", 1),
        "\x83": _refused("extension", 2),
        "\x84": _refused("extension", 4),
        "\x85": _tuple_of(1),
        "\x86": _tuple_of(2),
        "\x87": _tuple_of(3),
        "\x88": _push(True),
        "\x89": _push(False),
        "\x8a": _counted(1, _long),
        "\x8b": _counted(4, _long),
        # protocols 3 and 4
        "B": _counted_text(4, bytes),
        "C": _counted_text(1, bytes),
        "\x8c": _counted_text(1, _text),
        "\x8d": _counted_text(8, _text),
        "\x8e": _counted_text(8, bytes),
        "\x8f": lambda m: m.stack.append(Call(SET, ())),
        "\x90": _appends,
        "\x91": _frozen_set,
        "\x92": _new_object_with_keywords,
        "\x93": _stack_global,
        "\x94": lambda m: _put(m, len(m.memo)),
        "\x95": _frame,
        # protocol 5
        "\x96": _counted_text(8, bytes),
        "\x97": _refused("an out-of-band buffer"),
        "\x98": _refused("an out-of-band buffer"),
    }.items()
}

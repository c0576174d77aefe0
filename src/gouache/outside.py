"""What comes from outside is not trusted: one way to open files, one to parse text, one to print it.

- `open_outside` and `read_outside`: regular files only, by descriptor, with a size limit. A named pipe would block for
  ever, a device would never end, and a path can name another file the next time it is used.
- `parse_json`, `parse_toml`, `parse_yaml`: limited size, depth and length of numbers; no YAML aliases, which can expand
  to any size. They raise `ValueError` (`MalformedText`) with one line, never RecursionError.
- `printable` (in `errors`): control and direction characters are escaped before a terminal sees them; `json_line`
  does the same for JSON that is printed, and the command line's output streams are `PrintableStream`s, which let none
  through.

Model files have readers of their own in `files`, which open through `open_outside` and check their headers themselves.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from gouache.errors import FileError, printable

MAX_TEXT = 16_000_000  # bytes of a text file
MAX_TOML, MAX_YAML = 1_000_000, 200_000  # characters; their readers are slow
MAX_DEPTH = 64  # of nested lists and tables
MAX_DIGITS = 400  # of a number; a float64 has at most 309 before its point


class MalformedText(ValueError):
    """The text is not what it should be, or is beyond the limits. The message is one line, without the file's name."""


def open_outside(path: str | Path) -> BinaryIO:
    """`path` opened for reading, if it is a regular file (links are followed). Raises FileError."""
    path = Path(path)
    # O_NONBLOCK: opening a named pipe would wait for its writer.
    flags = os.O_RDONLY
    for flag in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"):
        flags |= getattr(os, flag, 0)
    try:
        if path.is_dir():  # Windows cannot open one
            raise FileError(path, "is a folder, expected a file")
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise FileError(path, "does not exist") from None
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from None
    except ValueError:  # a NUL in the name
        raise FileError(path, "is not a possible file name") from None
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        raise FileError(path, f"is {_KINDS.get(kind, 'something else')}, not a regular file")
    return os.fdopen(descriptor, "rb")


_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def read_outside(path: str | Path, limit: int = MAX_TEXT) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises FileError."""
    with open_outside(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(limit + 1) if size <= limit else b""
    if size > limit or len(data) > limit:
        raise FileError(path, f"has {max(size, len(data)):,} bytes, expected at most {limit:,}")
    return data


def read_text(path: str | Path, limit: int = MAX_TEXT, errors: str = "strict") -> str:
    """The same as text in UTF-8, with or without a byte order mark. Raises FileError."""
    try:
        return read_outside(path, limit).decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise FileError(path, f"is not text in UTF-8 (byte {error.start})") from None


def reason(error: FileError) -> str:
    """The message of a FileError without the path that it begins with."""
    return str(error).removeprefix(f"{printable(str(error.path))}: ")


def parse_json(text: str | bytes) -> Any:
    """A JSON value. Raises MalformedText."""
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedText(f"is not text in UTF-8 (byte {error.start})") from None
    _check_size(decoded)
    _check_depth(decoded)
    try:
        return json.loads(decoded, parse_int=_integer, parse_float=_float)
    except MalformedText:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedText(f"is not JSON: {printable(str(error))}") from None


def parse_toml(text: str) -> dict[str, Any]:
    """A TOML document. Raises MalformedText."""
    _check_size(text, MAX_TOML)
    _check_dots(text)
    try:
        return _checked(tomllib.loads(text, parse_float=_float))
    except MalformedText:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedText(f"is not TOML: {printable(str(error))}") from None


def parse_yaml(text: str) -> Any:
    """A YAML document of plain values, without aliases. Raises MalformedText."""
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise MalformedText("has YAML aliases, which are not read")
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise MalformedText(f"is nested more than {MAX_DEPTH} deep")
            try:
                return super().compose_node(parent, index)
            finally:
                self.depth -= 1

    _check_size(text, MAX_YAML)
    try:
        loader = Loader(text)  # a SafeLoader: plain values only
        try:
            return _checked(loader.get_single_data())
        finally:
            loader.dispose()
    except MalformedText:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError) as error:
        said = str(error).replace(' in "<unicode string>",', " at")  # PyYAML's name for a text
        raise MalformedText(f"is not YAML: {printable(' '.join(said.split()))}") from None


def json_line(value: Any, indent: int | None = None) -> str:
    """`value` as JSON that can be printed: the same value for a reader, with characters that are not printable escaped.

    JSON itself escapes only U+0000 to U+001F: not the control characters from U+0080 on, nor those that change the
    direction of text.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text)


class PrintableStream:
    """A text stream on which no control, direction or zero-width character is written, but line breaks and tabs.

    They are escaped as in JSON. `raw` is the stream itself, for what draws on the terminal.
    """

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        if not text.isprintable():
            text = "".join(json.dumps(each)[1:-1] if _acts_on_terminals(each) else each for each in text)
        return self.raw.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def _acts_on_terminals(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp")


def _check_size(text: str, limit: int = MAX_TEXT) -> None:
    if len(text) > limit:
        raise MalformedText(f"has {len(text):,} characters, expected at most {limit:,}")


def _checked(document: Any) -> Any:
    """A parsed document that is not too deep and has no number too large: `a.a.a = 1` and 0xfff... have no brackets
    and no decimal digits that could be counted in the text."""
    level, depth = [document], 0
    while level:
        if depth > MAX_DEPTH:
            raise MalformedText(f"is nested more than {MAX_DEPTH} deep")
        if any(isinstance(each, int) and each.bit_length() > 4 * MAX_DIGITS for each in level):
            raise MalformedText(f"has a number of more than {MAX_DIGITS} digits")
        containers = [each for each in level if isinstance(each, dict | list)]
        level = [inner for each in containers for inner in (each.values() if isinstance(each, dict) else each)]
        depth += 1
    return document


def _check_dots(text: str) -> None:
    """tomllib's time for a dotted key is quadratic in its parts, and for any key linear in the parts of its header."""
    lines = text.split("\n")
    for line in lines:
        if line.count(".") > MAX_DEPTH and line.lstrip().startswith("["):  # a header, or a line of an array
            names = _TOML_STRING.sub("", line).partition("#")[0].split(",")
            if max(name.count(".") for name in names) > MAX_DEPTH:
                raise MalformedText(f"is nested more than {MAX_DEPTH} deep")
    if sum(line.count(".") ** 2 for line in lines) > 10**8:  # a second
        raise MalformedText("has too many dots in a line")


_TOML_STRING = re.compile(r"""\"(?:\\.|[^"\\])*+"?|'[^']*'?""")


def _check_depth(text: str) -> None:
    """Before it is parsed: what is parsed deeper can still exhaust the stack of whoever walks through it."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return  # the common case, without looking at each character
    depth = 0
    for index, piece in enumerate(_split_strings(text)):
        if index % 2:
            continue  # a string
        for character in piece:
            if character in "[{":
                depth += 1
                if depth > MAX_DEPTH:
                    raise MalformedText(f"is nested more than {MAX_DEPTH} deep")
            elif character in "]}":
                depth -= 1


def _split_strings(text: str) -> list[str]:
    """Text and string literals in turn."""
    pieces: list[str] = []
    start = 0
    while True:
        opening = text.find('"', start)
        if opening < 0:
            return [*pieces, text[start:]]
        closing = text.find('"', opening + 1)
        while closing > 0 and _escaped(text, closing):
            closing = text.find('"', closing + 1)
        if closing < 0:
            return [*pieces, text[start:opening], text[opening:]]
        pieces += [text[start:opening], text[opening : closing + 1]]
        start = closing + 1


def _escaped(text: str, place: int) -> bool:
    """Whether an odd number of backslashes precedes `place`."""
    count = 0
    while place - 1 - count >= 0 and text[place - 1 - count] == "\\":
        count += 1
    return count % 2 == 1


def _integer(digits: str) -> int:
    return int(_short(digits))


def _float(digits: str) -> float:
    return float(_short(digits))


def _short(digits: str) -> str:
    if len(digits) > MAX_DIGITS:
        raise MalformedText(f"has a number of {len(digits)} digits, expected at most {MAX_DIGITS}")
    return digits

"""Files and text from outside: what is not a regular file, or is too large, too deep or too long, is one error."""

from __future__ import annotations

import io
import json
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gouache.errors import FileError
from gouache.outside import (
    MAX_DEPTH,
    MalformedText,
    PrintableStream,
    json_line,
    open_outside,
    parse_json,
    parse_toml,
    parse_yaml,
    read_outside,
    read_text,
)

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(values)
def test_json_is_read_as_the_standard_library_reads_it(value: object):
    assert parse_json(json.dumps(value)) == value == parse_json(json.dumps(value).encode())


@pytest.mark.parametrize("text", [
    "[" * 100_000, '{"a":' * 100_000, "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "1" * 5000,
    "-" + "1" * 5000,
    "1." + "0" * 5000, "{", "", '"', '"\\', "nul", "[1,]", '{"a": ' + "9" * 5000 + "}", '"' + "\\" * 99_999,
    '["a" "b"]',
])  # fmt: skip
def test_bad_json_is_one_line(text: str):
    with pytest.raises(MalformedText) as caught:
        parse_json(text)

    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_brackets_in_strings_do_not_count():
    assert parse_json(json.dumps(["[" * 1000, '\\"' * 50 + "{" * 1000])) == ["[" * 1000, '\\"' * 50 + "{" * 1000]
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)


@pytest.mark.parametrize("text", [
    "a = " + "[" * 100_000, "a = " + "1" * 5000, "a = ", "a = 1.0" + "0" * 5000, "\x00",
    ".".join("a" * 100_000) + " = 1", "a = 0x" + "f" * 5000, "a = 0b" + "1" * 9000, "[" + ".".join("a" * 5000) + "]",
    '["#,".' + ".".join("a" * 9000) + "]\n" + "".join(f"b{i}.c = 1\n" for i in range(30_000)), "a = 1\n" * 200_000,
])  # fmt: skip
def test_bad_toml_is_one_line(text: str):
    with pytest.raises(MalformedText) as caught:
        parse_toml(text)

    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_plain_toml_is_read():
    text = "[a.'b.c'.d]\nx = [\n  [" + ", ".join(["0.5"] * 500) + "], # " + "." * 500 + "\n]\nd.e = 1.5\n"

    assert parse_toml(text) == {"a": {"b.c": {"d": {"x": [[0.5] * 500], "d": {"e": 1.5}}}}}


@pytest.mark.parametrize("text", [
    "[" * 100_000, "a: &x [1]\nb: *x", "a: &a [*a]", "a: !!python/object/apply:os.system [ls]", "a: [", "\x00",
    "a: 1\n b: 2",
    "a: " + "1" * 5000, "a: 0x" + "f" * 5000, "a: " + "1:" * 3000 + "1", "- " * 100_000 + "a",
    "x: 2020-99-99", "? [a]\n: {b: c}\n? {d: e}\n: f",
    "a: &a [x]\n" + "\n".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]" for i in range(20)),
])  # fmt: skip
def test_bad_yaml_is_one_line(text: str):
    with pytest.raises(MalformedText) as caught:
        parse_yaml(text)

    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_plain_yaml_is_read():
    assert parse_yaml("a: {b: [1, 2.5, yes, null], c: text}") == {"a": {"b": [1, 2.5, True, None], "c": "text"}}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on this system")
def test_only_regular_files_are_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "link", "loop", "absent", ".", "nul\x00"):
        with pytest.raises(FileError) as caught:
            open_outside(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_size_and_encoding(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffé".encode())
    assert read_text(path) == "é" and read_outside(path, 5) == "\ufeffé".encode()
    with pytest.raises(FileError, match="expected at most 4"):
        read_outside(path, 4)
    path.write_bytes(b"ok \xff")
    with pytest.raises(FileError, match=r"not text in UTF-8 \(byte 3\)"):
        read_text(path)


@given(values, st.sampled_from([None, 1]))
def test_printed_json_is_printable_and_the_same_value(value: object, indent: int | None):
    line = json_line({"a": value, "b": "\x1b[2J\x9b\u202e\U000e0001\n é 猫"}, indent)

    assert json.loads(line) == {"a": value, "b": "\x1b[2J\x9b\u202e\U000e0001\n é 猫"}
    assert all(each.isprintable() or each == "\n" for each in line) and "é 猫" in line


@given(st.text() | st.text("\x1b\x9b\u202e\u200b\n\t\x00\U000e0001a é猫\u3000"))
def test_no_character_that_acts_on_a_terminal_is_written(text: str):
    raw = io.StringIO(newline="")
    stream = PrintableStream(raw)
    print(text, file=stream, end="")
    stream.writelines([text])

    written = raw.getvalue()
    assert not any(unicodedata.category(each) in ("Cc", "Cf", "Zl", "Zp") for each in written if each not in "\n\t")
    harmless = "".join(
        each for each in text if each in "\n\t" or unicodedata.category(each) not in ("Cc", "Cf", "Zl", "Zp")
    )
    assert written == harmless * 2 if harmless == text else len(written) > len(text) * 2
    assert stream.getvalue() is not None and stream.raw is raw


def test_printed_json_stays_the_same_value():
    raw = io.StringIO()
    value = {"\x7f\u202e": ["\U000e0001\x9b é 猫", "\ufeff"]}
    print(json.dumps(value, ensure_ascii=False), file=PrintableStream(raw))

    assert json.loads(raw.getvalue()) == value

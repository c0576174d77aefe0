from __future__ import annotations

import math
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gouache.prompts.grammar import Break, escape, parse, unsupported, weight_of
from gouache.prompts.tags import take_tags

# Prompts made of what the grammar treats specially, so that brackets interact often.
TANGLED = st.lists(
    st.sampled_from(
        ["(", ")", "[", "]", "\\", "\\(", "\\)", "\\[", "\\]", "\\\\", ":", "|", " ", "a", "b c", ",", "1.5", "-", "."]
    )
    | st.sampled_from([":1.3)", ": 0.5 )", ":-2)", ":+.5)", ":2.)", ":1.2.3)", ":.)", ":)"])
    | st.sampled_from(["BREAK", " BREAK ", "xBREAK", "é"]),
    max_size=30,
).map("".join)


def approximately(expected: list[tuple[str, float]]) -> list[tuple[str, object]]:
    return [(text, pytest.approx(weight)) for text, weight in expected]


def by_character(text: str) -> list[tuple[str, float]]:
    """A1111's rules applied by character: a closing bracket multiplies everything since its opening bracket."""
    written: list[list] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(kind: str, factor: float) -> None:
        for entry in written[opened[kind].pop() :]:
            entry[1] *= factor

    def is_number(digits: str) -> bool:
        try:
            return math.isfinite(float(digits))
        except ValueError:
            return False

    while text:
        weight = re.match(r":\s*([-+]?[.\d]+)\s*\)", text)
        length = 1
        if text[0] == "\\":
            length = 2 if text[1:2] and text[1] in "()[]\\" else 1
            written += [[character, 1.0] for character in text[1:length]]
        elif text[0] in "([":
            opened[text[0]].append(len(written))
        elif weight and is_number(weight[1]):
            length = weight.end()
            if opened["("]:
                close("(", float(weight[1]))
            else:
                written += [[character, 1.0] for character in text[:length]]
        elif text[0] == ")" and opened["("]:
            close("(", 1.1)
        elif text[0] == "]" and opened["["]:
            close("[", 1 / 1.1)
        else:
            plain = re.match(r"[^\\()\[\]:]+", text)
            length = plain.end() if plain else 1
            for number, part in enumerate(re.split(r"\s*\bBREAK\b\s*", text[:length])):
                if number:
                    written.append(["BREAK", math.nan])
                written += [[character, 1.0] for character in part]
        text = text[length:]
    while opened["("]:
        close("(", 1.1)
    while opened["["]:
        close("[", 1 / 1.1)
    return [(character, weight) for character, weight in written]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.5730000000000004),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641000000000006),
                (".", 1.1),
            ],
        ),
    ],
)
def test_the_documented_examples_of_a1111(text: str, expected: list[tuple[str, float]]):
    assert parse(text) == approximately(expected)


@given(text=TANGLED)
@settings(deadline=None)
def test_every_character_gets_the_weight_of_the_rules(text: str):
    found: list[tuple[str, object]] = []
    for run in parse(text):
        if isinstance(run, Break):
            found.append(("BREAK", pytest.approx(math.nan, nan_ok=True)))
        else:
            found += [(character, pytest.approx(run[1])) for character in run[0]]

    assert found == by_character(text)


@given(text=st.text())
@settings(deadline=None)
def test_any_text_parses_to_runs_that_differ_from_their_neighbours(text: str):
    found = [run for run in parse(text) if not isinstance(run, Break)]

    assert all(words for words, _ in found)
    if not re.search(r"[\\()\[\]]|BREAK", text):
        assert found == ([(text, 1.0)] if text else [])


@given(text=st.one_of(st.text(), TANGLED))
@settings(deadline=None)
def test_escaped_text_is_read_as_itself(text: str):
    assert parse(escape(text)) == ([(text, 1.0)] if text else [])


@given(text=TANGLED.filter(lambda text: text), weight=st.decimals(0, 3, places=2))
@settings(deadline=None)
def test_escaped_text_has_the_weight_around_it(text: str, weight):
    assert parse(f"({escape(text)}:{weight})") == [(text, pytest.approx(float(weight)))]


@given(weights=st.lists(st.decimals("0.1", 3, places=1), min_size=1, max_size=6))
@settings(deadline=None)
def test_nested_weights_multiply(weights: list):
    text = "(" * len(weights) + "a" + "".join(f":{weight})" for weight in weights)

    assert parse(text) == [("a", pytest.approx(math.prod(map(float, weights))))]


@pytest.mark.parametrize("weight", ["1.2.3", ".", "1.2x", "--1", "", "1e3", "nan"])
def test_a_malformed_weight_is_text(weight: str):
    assert parse(f"(a:{weight})") == [(f"a:{weight}", pytest.approx(1.1))]


def test_unopened_brackets_are_text():
    assert parse("a) b] c:1.3) d") == [("a) b] c:1.3) d", 1.0)]


def test_crossing_brackets_overlap():
    assert parse("(a [b:2) c]") == approximately([("a ", 2.0), ("b", 2 / 1.1), (" c", 1 / 1.1)])
    assert parse("[a (b] c:2)") == approximately([("a ", 1 / 1.1), ("b", 2 / 1.1), (" c", 2.0)])


def test_break_separates_runs_and_includes_the_spaces_around_it():
    assert parse("a  BREAK\n b") == [("a", 1.0), Break(), ("b", 1.0)]
    assert parse("(a BREAK b:1.5) BREAK") == [("a", 1.5), Break(), ("b", 1.5), Break()]
    assert parse("BREAKFAST breaking xBREAK") == [("BREAKFAST breaking xBREAK", 1.0)]


@pytest.mark.parametrize(
    "weight", ["1.3", " 0.5 ", "-2", "+.5", "2.", "1.2.3", ".", "", "1e3", "nan", "b", "1 2", "1)"]
)
def test_a_weight_has_the_value_that_it_has_in_brackets(weight: str):
    given = weight_of(weight)

    if given is None:
        assert parse(f"(a:{weight})")[0][0] != "a"  # type: ignore[index]
    else:
        assert parse(f"(a:{weight})") == [("a", given)]


@pytest.mark.parametrize(
    "text",
    [
        "(" * 20_000 + "a", "(a" * 20_000, " " * 50_000, ":" * 50_000, "1" * 50_000,
        "(" * 20_000 + "[" * 20_000 + "cat" + ")" * 20_000, "(" * 20_000 + "[" * 20_000 + "a)" * 20_000,
        "([" * 20_000 + "a)b]" * 20_000, "<lora:" * 20_000, "<" * 50_000, "a<b:" * 20_000,
    ],
)  # fmt: skip
def test_hostile_prompts_are_parsed_without_recursion_and_quickly(text: str):
    start = time.process_time()

    parse(text)
    take_tags(text)
    unsupported(text)

    assert time.process_time() - start < 5  # 0.1 s; anything quadratic takes minutes


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a [red] (cat:1.2), 16:9 [a:b:0.5] [a|b] AND <3 x>y", []),
        ("a <lora:detail:0.8> b <hypernet:anime:1>", ["<lora:detail:0.8>", "<hypernet:anime:1>"]),
        ("[a:<lora:x:1>:0.3] <lora:x:1>", ["<lora:x:1>"]),
        ("a <lora:x:1, cat", ["<lora:x:1, cat"]),
        ("a <lora:>, <x:> <Hypernet:", ["<lora:>", "<x:>", "<Hypernet:"]),
    ],
)
def test_remaining_tags_are_reported_once(text: str, found: list[str]):
    assert unsupported(text) == found


@given(text=st.text() | TANGLED)
@settings(deadline=None)
def test_reporting_tags_never_fails_and_quotes_the_text(text: str):
    assert all(part in text for part in unsupported(text))

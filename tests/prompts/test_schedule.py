"""Prompt schedules and `AND`: recorded readings of AUTOMATIC1111's parser, and prompts of known meaning."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gouache.errors import RequestError
from gouache.prompts import schedule
from gouache.prompts.schedule import (
    Alternate,
    Emphasis,
    Node,
    Nodes,
    Part,
    Span,
    Switch,
    Text,
    composed,
    scheduled,
    tree,
)

RECORDED = json.loads(Path(__file__).with_name("recorded_schedules.json").read_text())["cases"]
TANGLED = st.text(st.sampled_from("ab[]():|\\ .15,\n[]:")) | st.lists(
    st.sampled_from(["a", "b ", "[", "]", "(", ")", ":", "|", ":3]", ":.5]", "[a:b:2]", "[a|b]", "\\", "(a:1.2)"])
).map("".join)
STEPS = st.integers(1, 30)
BASE_STEPS = st.none() | st.integers(1, 30)
HOSTILE = [
    "(",
    "[",
    "[a:",
    "[a|",
    "[:",
    "()",
    "[]",
    "[[a:b:3]",
    "[a:b:3]",
    "[a|b]",
    "\\(",
    "a",
    "]",
    "[a:1",
    " ",
    ":1",
    "|",
]
NESTED = [
    ("(", ")"),
    ("[a:", ":3]"),
    ("[", "::3]"),
    ("[a|", "]"),
    ("[", "|]"),
    ("(a:", ")"),
    ("[(a", ":b):3]"),
    ("[a:b", ":c]"),
]


@pytest.mark.parametrize("case", RECORDED, ids=[f"{case['text'][:30]!r} {case['steps']}" for case in RECORDED])
def test_a_schedule_is_one_that_a1111_reads(case: dict[str, Any]):
    spans = scheduled(case["text"], case["steps"], base_steps=case.get("base_steps"))

    assert [[span.last, span.text] for span in spans] in case["readings"]


def test_nearly_all_recorded_cases_have_one_reading_and_every_group_that_can_be_read_is_read():
    ambiguous = [case for case in RECORDED if len(case["readings"]) > 1]

    assert len(RECORDED) >= 200
    assert len(ambiguous) <= 12
    for case in ambiguous:
        spans = scheduled(case["text"], case["steps"])
        lengths = [sum(len(text) for _, text in reading) / len(reading) for reading in case["readings"]]
        assert sum(len(span.text) for span in spans) / len(spans) == min(lengths)


@dataclass(frozen=True)
class Built:
    """A prompt and what it is made to mean: the text at (step, steps, base steps or None)."""

    text: str
    at: Callable[[int, int, int | None], str]


def built_text(text: str) -> Built:
    return Built(text, lambda step, steps, base: text)


def built_sequence(parts: list[Built]) -> Built:
    return Built(
        "".join(part.text for part in parts),
        lambda step, steps, base: "".join(part.at(step, steps, base) for part in parts),
    )


def built_emphasis(body: Built, brackets: str) -> Built:
    opening, closing = brackets.split("x")
    return Built(
        opening + body.text + closing, lambda step, steps, base: opening + body.at(step, steps, base) + closing
    )


def built_switch(before: Built | None, after: Built, hundredths: int, whole: bool, space: str) -> Built:
    """At a number given as hundredths, so that its share is computed in whole numbers."""
    number = str(hundredths // 25) if whole else f"{hundredths / 100:.2f}"

    def at(step: int, steps: int, base: int | None) -> str:
        if whole:
            last = hundredths // 25 - (base or 0)
        else:
            last = math.floor((hundredths - (0 if base is None else 100)) * steps / 100)
        if step > min(last, steps):
            return after.at(step, steps, base)
        return before.at(step, steps, base) if before else ""

    start = "" if before is None else f"{before.text}:"
    return Built(f"[{start}{after.text}:{space}{number}{space}]", at)


def built_alternate(options: list[Built]) -> Built:
    return Built(
        f"[{'|'.join(option.text for option in options)}]",
        lambda step, steps, base: options[(step - 1) % len(options)].at(step, steps, base),
    )


def extended(inner: st.SearchStrategy[Built]) -> st.SearchStrategy[Built]:
    sequence = st.lists(inner, max_size=3).map(built_sequence)
    return st.one_of(
        sequence,
        st.builds(built_emphasis, sequence, st.sampled_from(["(x)", "[x]", "(x:1.2)", "(x: 0.5 )"])),
        st.builds(
            built_switch,
            st.none() | sequence,
            sequence,
            # Multiples of a quarter are exact in binary, so the share has no rounding to reproduce.
            st.integers(0, 12).map(lambda quarter: quarter * 25),
            st.booleans(),
            st.sampled_from(["", " ", "\n\t"]),
        ),
        st.lists(sequence, min_size=2, max_size=4).map(built_alternate),
    )


PLAIN = st.text(st.sampled_from("abc ,.1\n") | st.characters(exclude_characters="\\[]():|", codec="utf-8"), max_size=6)
ESCAPED = st.sampled_from(["\\(", "\\]", "\\:", "\\|", "\\\\", "\\a"])
BUILT = st.recursive((PLAIN | ESCAPED).map(built_text), extended, max_leaves=12)


@given(prompt=BUILT, steps=STEPS, base_steps=BASE_STEPS)
@settings(deadline=None)
def test_a_well_formed_prompt_means_what_it_was_built_from(prompt: Built, steps: int, base_steps: int | None):
    spans = scheduled(prompt.text, steps, base_steps=base_steps)

    held = [next(span.text for span in spans if step <= span.last) for step in range(1, steps + 1)]
    assert held == [prompt.at(step, steps, base_steps) for step in range(1, steps + 1)]


@given(text=st.text() | TANGLED, steps=STEPS, base_steps=BASE_STEPS)
@settings(deadline=None, max_examples=300)
def test_the_spans_of_any_text_cover_all_steps_and_differ_from_their_neighbours(
    text: str, steps: int, base_steps: int | None
):
    spans = scheduled(text, steps, base_steps=base_steps)

    lasts = [span.last for span in spans]
    assert lasts == sorted(set(lasts)) and lasts[0] >= 1 and lasts[-1] == steps
    assert all(one.text != two.text for one, two in pairwise(spans))


@given(text=PLAIN, steps=STEPS, base_steps=BASE_STEPS)
@settings(deadline=None)
def test_plain_text_is_one_span_of_itself(text: str, steps: int, base_steps: int | None):
    assert scheduled(text, steps, base_steps=base_steps) == (Span(steps, text),)


def read(nodes: Nodes, step: int, steps: int) -> str:
    return "".join(read_node(node, step, steps) for node in nodes)


def read_node(node: Node, step: int, steps: int) -> str:
    match node:
        case Text(text):
            return text
        case Emphasis(bracket, body, weight):
            colon = "" if weight is None else ":" + read(weight, step, steps)
            return bracket + read(body, step, steps) + colon + {"(": ")", "[": "]"}[bracket]
        case Switch(before, after, when):
            last = float(when) * steps if "." in when else float(when)
            return read(before if step <= min(steps, math.trunc(last)) else after, step, steps)
        case Alternate(options):
            return read(options[(step - 1) % len(options)], step, steps)


@given(text=TANGLED, steps=STEPS)
@settings(deadline=None, max_examples=300)
def test_the_tree_has_the_texts_of_the_spans(text: str, steps: int):
    nodes = tree(text)

    for span in scheduled(text, steps):
        assert read(nodes, span.last, steps) == span.text


def test_the_tree_of_an_example():
    a, b, c = (Text("a"),), (Text("b"),), (Text("c"),)

    assert tree("x [a:b: .5 ][c:3]") == (Text("x "), Switch(a, b, ".5"), Switch((), c, "3"))
    assert tree("[a|[b::2]|]") == (Alternate((a, (Switch(b, (), "2"),), ())),)
    assert tree("((a:1.2) [b]") == (Text("("), Emphasis("(", a, (Text("1.2"),)), Text(" "), Emphasis("[", b))
    assert tree("(a:[b:c:3])") == (Emphasis("(", a, (Switch(b, c, "3"),)),)
    assert tree(r"\[a:b:3\] |") == (Text(r"\[a:b:3\] |"),)
    assert tree("") == ()


def lines_run(call: Callable[[], object]) -> int:
    """How many lines of `schedule` a call executes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename != schedule.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    "make",
    [
        *(lambda n, unit=unit: unit * n for unit in HOSTILE),
        *(lambda n, pair=pair: pair[0] * n + "x" + pair[1] * n for pair in NESTED),
    ],
    ids=[*HOSTILE, *("x".join(pair) for pair in NESTED)],
)
@pytest.mark.parametrize(
    "read", [lambda text: scheduled(text, 5), tree, composed], ids=["scheduled", "tree", "composed"]
)
def test_work_grows_in_proportion_to_the_text(make: Callable[[int], str], read: Callable[[str], object]):
    once, twice = lines_run(lambda: read(make(200))), lines_run(lambda: read(make(400)))

    assert twice <= 2 * once + 200


@pytest.mark.parametrize("unit", HOSTILE)
def test_ten_thousand_repetitions_are_read_without_recursion(unit: str):
    text = unit * 10_000

    assert scheduled(text, 3)[-1].last == 3
    assert tree(text)
    assert composed(text)


@pytest.mark.parametrize(("opening", "closing"), NESTED)
def test_brackets_nested_five_thousand_deep_are_read_without_recursion(opening: str, closing: str):
    text = opening * 5000 + "x" + closing * 5000

    assert scheduled(text, 3)[-1].last == 3
    assert tree(text)


def test_a_number_beyond_every_float_is_beyond_every_step():
    assert scheduled("[a:b:1e999]", 5) == (Span(5, "a"),)
    assert scheduled(f"[a:b:{'9' * 5000}]", 5) == (Span(5, "a"),)
    assert scheduled("[a:b:-1e999]", 5) == (Span(5, "b"),)
    assert scheduled("[a:b:-1.e999]", 5, base_steps=5) == (Span(5, "b"),)


@pytest.mark.parametrize("steps", [0, -1])
def test_a_run_without_steps_has_no_schedule(steps: int):
    with pytest.raises(ValueError, match="expected at least 1"):
        scheduled("a", steps)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [Part("", 1.0)]),
        ("a cat", [Part("a cat", 1.0)]),
        ("a cat AND a dog", [Part("a cat", 1.0), Part(" a dog", 1.0)]),
        ("a cat :1.2 AND a dog AND a bird:-0.5 ", [Part("a cat", 1.2), Part(" a dog", 1.0), Part(" a bird", -0.5)]),
        ("a : +.5\nAND b: 2. ", [Part("a", 0.5), Part(" b", 2.0)]),
        ("first\nline :2 AND\nb", [Part("first\nline", 2.0), Part("\nb", 1.0)]),
        ("BAND and ANDROID _AND_ AND", [Part("BAND and ANDROID _AND_", 1.0), Part("", 1.0)]),
        ("[a AND b:c:3]", [Part("[a", 1.0), Part(" b:c:3]", 1.0)]),
        ("(a:1.2) AND [b:c:3]", [Part("(a:1.2)", 1.0), Part(" [b:c:3]", 1.0)]),
        ("at 16:9", [Part("at 16", 9.0)]),
        ("a:b:1:2", [Part("a:b:1", 2.0)]),
        ("a:1e3 AND b:1.2.3 AND c:.", [Part("a:1e3", 1.0), Part(" b:1.2.3", 1.0), Part(" c:.", 1.0)]),
        (":3", [Part("", 3.0)]),
        ("a\\:3", [Part("a\\", 3.0)]),
    ],
)
def test_and_splits_a_prompt_into_weighted_parts(text: str, parts: list[Part]):
    assert list(composed(text)) == parts


@given(text=st.text() | TANGLED | st.lists(st.sampled_from(["AND", " ", "a", ":", "1", ".5", "-"])).map("".join))
@settings(deadline=None)
def test_any_text_is_composed_of_finite_parts(text: str):
    parts = composed(text)

    assert parts
    assert all(math.isfinite(part.weight) for part in parts)
    assert all(part.text == part.text.rstrip() for part in parts)


@pytest.mark.parametrize("text", ["a:" + "1" * 400, "a AND b : 20000000", "a :-10000000", "(a:" + "1" * 100_000])
def test_a_weight_beyond_use_at_the_end_is_refused(text: str):
    with pytest.raises(RequestError, match=r"prompt: has a weight of .* at its end") as caught:
        composed(text)

    assert len(str(caught.value)) < 200


def test_the_greatest_weight_at_the_end_is_used():
    assert composed("a:1000000")[0].weight == 1e6

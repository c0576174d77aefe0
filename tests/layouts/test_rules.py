from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gouache.errors import ModelError
from gouache.layouts.rules import (
    AsConv,
    AsLinear,
    Drop,
    Join,
    Rename,
    Rule,
    Split,
    Transpose,
    invert,
    plan,
    prove,
    under,
)


def moved(rules, tensors):
    return {name: origin.tensor(tensors.__getitem__) for name, origin in plan(rules, tensors).origins.items()}


def test_each_placeholder_keeps_its_value():
    rules = [Rename("down.{i}.block.{j}.{leaf}", "levels.{j}.of.{i}.{leaf}")]

    found = plan(rules, ["down.3.block.12.weight"])

    assert list(found.origins) == ["levels.12.of.3.weight"]


def test_a_starred_placeholder_matches_all_remaining_segments_and_a_plain_one_matches_one():
    rules = [Rename("a.{one}.end", "x.{one}"), Rename("b.{rest*}", "y.{rest*}")]

    found = plan(rules, ["a.1.end", "a.1.2.end", "b.1.2.end", "a.end"])

    assert set(found.origins) == {"x.1", "y.1.2.end"}
    assert found.unnamed == ("a.1.2.end", "a.end")


def test_the_first_matching_rule_is_used_even_if_a_later_one_has_a_longer_head():
    general_first = [Rename("{all*}", "kept.{all*}"), Drop("text.position_ids", "not needed")]

    assert not plan(general_first, ["text.position_ids"]).dropped
    assert plan(general_first[::-1], ["text.position_ids"]).dropped == {"text.position_ids": "not needed"}


def test_prefixes_need_not_end_at_a_dot():
    rules = under("unet/", [Rename("{all*}", "{all*}")])

    assert plan(rules, ["unet/conv_in.weight", "vae/conv_in.weight"]).origins["conv_in.weight"].sources == (
        "unet/conv_in.weight",
    )
    assert plan(invert(rules), ["conv_in.weight"]).origins.keys() == {"unet/conv_in.weight"}


def test_split_returns_the_parts_in_order_as_views():
    fused = torch.arange(12.0).reshape(6, 2)

    parts = moved([Split("qkv", ("q", "k", "v"))], {"qkv": fused})

    assert torch.equal(parts["q"], fused[:2])
    assert torch.equal(parts["k"], fused[2:4])
    assert torch.equal(parts["v"], fused[4:])
    assert all(part.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr() for part in parts.values())


@pytest.mark.parametrize(
    ("rule", "shape", "expected"),
    [
        (Transpose("a", "b"), (2, 3), lambda a: a.transpose(0, 1)),
        (AsConv("a", "b"), (2, 3), lambda a: a.reshape(2, 3, 1, 1)),
        (AsLinear("a", "b"), (2, 3, 1, 1), lambda a: a.squeeze(-1).squeeze(-1)),
    ],
)
def test_changes_of_shape_are_views_and_known_before_reading(rule, shape, expected):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    result = moved([rule], {"a": tensor})["b"]

    assert torch.equal(result, expected(tensor))
    assert result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert plan([rule], ["a"]).origins["b"].shape({"a": shape}) == tuple(result.shape)


def test_join_is_the_inverse_of_split():
    fused = torch.arange(6.0)
    rules = [Split("h.{i}.qkv", ("l.{i}.q", "l.{i}.k", "l.{i}.v"))]

    restored = moved(invert(rules), moved(rules, {"h.7.qkv": fused}))

    assert torch.equal(restored["h.7.qkv"], fused)


@pytest.mark.parametrize(
    ("rule", "shapes"),
    [
        (Split("a", ("x", "y", "z")), {"a": (4, 4)}),
        (Split("a", ("x", "y")), {"a": ()}),
        (Transpose("a", "x"), {"a": (4,)}),
        (AsConv("a", "x"), {"a": (4, 4, 3, 3)}),
        (AsLinear("a", "x"), {"a": (4, 4, 3, 3)}),
        (Join(("a", "b"), "x"), {"a": (2, 3), "b": (2, 4)}),
    ],
)
def test_a_rule_that_cannot_apply_names_the_tensor_and_its_shape(rule, shapes):
    origin = next(iter(plan([rule], shapes).origins.values()))

    with pytest.raises(ModelError, match=r"a \[.*\]"):
        origin.shape(shapes)
    with pytest.raises(ModelError, match=r"a \[.*\]"):
        origin.tensor(lambda name: torch.zeros(shapes[name]))


def test_two_tensors_for_one_name_are_refused():
    with pytest.raises(ModelError, match=r"(old\.w and new\.w|new\.w and old\.w) both map to w"):
        plan([Rename("old.w", "w"), Rename("new.w", "w")], ["old.w", "new.w"])


def test_a_join_without_one_of_its_parts_is_refused():
    with pytest.raises(ModelError, match=r"q needs k, which is missing"):
        plan([Join(("q", "k"), "qk")], ["q"])


def test_prove_refuses_a_table_that_does_not_cover_a_name():
    with pytest.raises(ModelError, match="no rule matches b"):
        prove([Rename("a", "x")], {"a": (1,), "b": (1,)})


def test_prove_refuses_a_table_that_is_not_invertible():
    shifted = [Rename("{i}.a", "a.{i}"), Rename("{i}.b", "b")]

    with pytest.raises(ModelError, match="does not restore"):
        prove(shifted, {"1.b": (2,)})


segments = st.text("abcdefgh_0123456789", min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_table_with_distinct_heads_is_invertible(data):
    heads = data.draw(st.lists(segments, min_size=1, max_size=6, unique=True))
    kinds = data.draw(st.lists(st.integers(0, 3), min_size=len(heads), max_size=len(heads)))
    rules: list[Rule] = []
    tensors = {}
    for number, (head, kind) in enumerate(zip(heads, kinds)):
        i, rest = data.draw(segments), data.draw(segments)
        if kind == 0:
            rules.append(Rename(f"{head}.{{i}}.{{rest*}}", f"{number}.{{i}}.{{rest*}}"))
        elif kind == 1:
            rules.append(Transpose(f"{head}.{{i}}.x.{{rest*}}", f"{number}.y.{{i}}.{{rest*}}"))
        elif kind == 2:
            rules.append(Split(f"{head}.{{i}}.{{j}}", (f"{number}.{{j}}.q.{{i}}", f"{number}.{{j}}.k.{{i}}")))
        else:
            rules.append(AsConv(f"{head}.{{i}}.{{j}}", f"{number}.conv.{{i}}.{{j}}"))
        name = f"{head}.{i}.x.{rest}" if kind == 1 else f"{head}.{i}.{rest}"
        tensors[name] = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))

    prove(rules, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    restored = moved(invert(rules), moved(rules, tensors))

    assert restored.keys() == tensors.keys()
    assert all(torch.equal(restored[name], tensors[name]) for name in tensors)

from __future__ import annotations

import pytest
import torch

from gouache.diffusion.conditioning import Conditioning, stack
from gouache.errors import RequestError


def numbered_rows(rows: int, tokens: int = 77, start: float = 0.0) -> Conditioning:
    """Every value of a row is the number of the row."""
    numbers = torch.arange(rows) + start
    return Conditioning(
        context=numbers.reshape(-1, 1, 1).expand(-1, tokens, 8),
        vector=numbers.reshape(-1, 1).expand(-1, 5),
        concat=numbers.reshape(-1, 1, 1, 1).expand(-1, 5, 2, 2),
    )


def numbers_of(conditioning: Conditioning) -> list[list[float]]:
    parts = (conditioning.context, conditioning.vector, conditioning.concat)
    return [part.flatten(1)[:, 0].tolist() for part in parts if part is not None]


def test_rows_repeat_and_stack_apply_to_every_part():
    conditioning = numbered_rows(3)

    assert numbers_of(conditioning.rows([2, 0])) == [[2, 0]] * 3
    assert numbers_of(conditioning.rows(slice(1, 3))) == [[1, 2]] * 3
    assert numbers_of(conditioning.rows([0, 1]).repeat(2)) == [[0, 1, 0, 1]] * 3
    assert numbers_of(stack(conditioning, numbered_rows(1, start=9))) == [[0, 1, 2, 9]] * 3
    assert len(stack(conditioning, conditioning)) == 6


def test_absent_parts_stay_absent():
    text_only = Conditioning(torch.zeros(2, 77, 8))

    joined = stack(text_only, text_only.rows([0])).repeat(2)

    assert len(joined) == 6 and joined.vector is None and joined.concat is None


def test_stacking_different_shapes_is_refused_and_the_error_has_both_shapes():
    with pytest.raises(RequestError, match=r"77.*154"):
        stack(numbered_rows(1), numbered_rows(1, tokens=154))


def test_stacking_refuses_a_part_that_only_one_has():
    with pytest.raises(RequestError, match="'vector'"):
        stack(numbered_rows(1), Conditioning(torch.zeros(1, 77, 8)))


def test_padding_appends_the_empty_prompt_chunk_by_chunk():
    empty = torch.full((1, 77, 8), -1.0)

    padded = numbered_rows(2).pad_to(3, empty)

    assert padded.tokens == 3 * 77
    assert torch.equal(padded.context[:, :77], numbered_rows(2).context)
    assert bool((padded.context[:, 77:] == -1).all())
    assert padded.stacks_with(numbered_rows(1, tokens=3 * 77))


def test_a_context_that_is_long_enough_is_not_padded():
    long = numbered_rows(1, tokens=154)

    assert long.pad_to(1, torch.zeros(1, 77, 8)) is long


def test_to_moves_every_part():
    moved = numbered_rows(1).to(dtype=torch.float16)

    assert {moved.context.dtype, moved.vector.dtype, moved.concat.dtype} == {torch.float16}

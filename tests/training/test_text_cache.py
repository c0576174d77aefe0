"""The text cache, compared with encoding whole batches at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from gouache import Model
from gouache.diffusion.conditioning import Conditioning
from gouache.prompts.encode import Sizes, add_sizes, encode
from gouache.training.text_cache import PACK, TextCache

from .data_sets import Encoders

LONG = "a photograph of a red fox, " * 15
TEXTS = ["a cat", "", LONG, "a (very:1.4) big dog", LONG + LONG]


def equal(one: Conditioning | None, two: Conditioning) -> bool:
    assert one is not None
    return one.parts.keys() == two.parts.keys() and all(
        torch.equal(part, two.parts[name]) for name, part in one.parts.items()
    )


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_cached_captions_are_those_of_a_batch_encoded_at_once(
    loaded: Callable[[str], Model], tmp_path: Path, family: str
):
    model = loaded(family)

    @torch.no_grad()
    def together(texts: list[str], sizes: list[Sizes] | None = None) -> Conditioning:
        return encode(
            texts, model.tokenizer, model.text_encoders, model.text_recipe, sizes=sizes, pooled_only=sizes is None
        )

    first = TextCache(tmp_path, "x", together)
    for text in TEXTS:
        first.row(text)
    first.flush()
    cache = TextCache(tmp_path, "x", lambda texts: pytest.fail("encoded again"))
    sizes = [Sizes((64, 64 + row), (500, 400 + row), (row, 2 * row)) for row in range(len(TEXTS))]

    joined = cache.join([cache.row(text) for text in TEXTS])

    expected = together(TEXTS, sizes)
    found = add_sizes(joined, model.text_recipe, sizes)
    assert found.tokens == 77 * 3
    for name, part in expected.parts.items():
        assert_close(found.parts[name], part, rtol=0, atol=1e-5)


def test_a_row_is_read_back_bit_for_bit_in_its_dtype(tmp_path: Path):
    def half(texts: list[str]) -> Conditioning:
        return Encoders().text(texts).to(dtype=torch.bfloat16)

    cache = TextCache(tmp_path, "x", half)
    made = cache.row("a b c")
    assert equal(cache.read("a b c"), made)  # not yet written
    cache.flush()

    assert equal(TextCache(tmp_path, "x", half).read("a b c"), made)
    assert made.context.dtype == torch.bfloat16


def test_each_caption_and_each_encoder_has_its_own_entry(tmp_path: Path):
    encoders = Encoders()
    for name in ("x", "y", "x"):
        cache = TextCache(tmp_path, name, encoders.text)
        for text in ("a, b", "b, a", "a, b", ""):
            assert equal(cache.row(text), Encoders().text([text]))
        cache.flush()

    assert encoders.texts == ["a, b", "b, a", "", "a, b", "b, a", ""]


def test_many_captions_are_in_few_files_and_little_memory(tmp_path: Path):
    encoders = Encoders()
    cache = TextCache(tmp_path, "x", encoders.text)
    for number in range(3 * PACK + 5):
        cache.row(f"caption {number}")
        assert len(cache._new) < PACK
    assert len(list(tmp_path.iterdir())) == 3

    # As after a kill: what was only in memory is encoded again.
    encoders.texts.clear()
    again = TextCache(tmp_path, "x", encoders.text)
    for number in range(3 * PACK + 5):
        assert (f"caption {number}" in again) == (number < 3 * PACK)
        again.row(f"caption {number}")
    assert encoders.texts == [f"caption {number}" for number in range(3 * PACK, 3 * PACK + 5)]


@pytest.mark.parametrize("position", [0, -1, 10])
def test_a_damaged_file_is_made_again(tmp_path: Path, position: int):
    texts = [f"caption {number}" for number in range(5)]
    cache = TextCache(tmp_path, "x", Encoders().text)
    rows = {text: cache.row(text) for text in texts}
    cache.flush()
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)

    encoders = Encoders()
    for _ in range(2):
        encoders.texts.clear()
        again = TextCache(tmp_path, "x", encoders.text)
        assert all(equal(again.row(text), row) for text, row in rows.items())
        again.flush()
        assert all(equal(again.read(text), row) for text, row in rows.items())
    assert encoders.texts == []


def test_without_a_folder_nothing_is_kept():
    encoders = Encoders()
    cache = TextCache(None, "x", encoders.text)

    cache.row("a")
    cache.row("a")

    assert encoders.texts == ["a", "a"] and "a" not in cache

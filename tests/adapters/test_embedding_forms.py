"""Embedding files of odd origin: read, or refused with the names of their entries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gouache.adapters.embedding import bundled_vectors, vectors_of
from gouache.errors import ModelError
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.layouts.adapters import bundled

V = torch.arange(2 * 768, dtype=torch.float32).reshape(2, 768)


@pytest.mark.parametrize(
    "content",
    [{"<my.word>": V}, {"*": V, "step": torch.tensor(5)}, {"<cat>": V, "step": torch.tensor([5])}, {"*": V, "step": 5},
     {"string_to_param": {"*": V}, "step": torch.tensor(5)}],
    ids=["dots", "scalar", "one number", "number", "A1111"],
)  # fmt: skip
def test_vectors_are_found_beside_counters_and_under_any_placeholder(content: dict[str, Any], tmp_path: Path):
    torch.save(content, tmp_path / "e.bin")
    file = open_model(tmp_path / "e.bin")

    assert identify(file).kind.value == "embedding"
    assert torch.equal(vectors_of(file)["text_encoder"], V)


@pytest.mark.parametrize("content", [{"string_to_param": {"first": V, "second": V}}, {"<first>": V, "<second>": V}])
def test_two_embeddings_in_one_file_are_refused_with_both_names(content: dict[str, Any], tmp_path: Path):
    torch.save(content, tmp_path / "e.pt")

    with pytest.raises(ModelError, match=r"holds 2 embeddings \(<?first>?, <?second>?\), expected one"):
        vectors_of(open_model(tmp_path / "e.pt"))


@pytest.mark.parametrize("word", ["word", "my.word", "a.b.c", "string_to_param"])
@pytest.mark.parametrize("tail", ["string_to_param.*", "emb_params"])
def test_bundled_words_may_have_dots(word: str, tail: str, tmp_path: Path):
    save_file({f"bundle_emb.{word}.{tail}": V}, tmp_path / "l.safetensors")
    file = open_model(tmp_path / "l.safetensors")
    found = bundled(file)

    assert list(found) == [word]
    assert torch.equal(bundled_vectors(file, found[word])["text_encoder"], V)

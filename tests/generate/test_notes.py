"""Remarks on prompts: grammar that is not followed yet, words that a model never met."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gouache
from gouache import Model
from gouache.app.settings import Settings
from gouache.generate.notes import notes
from gouache.generate.request import Request
from tests.pipelines import Narrow, altered

TOKENS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


@pytest.fixture
def learner(narrow: Callable[[str], Narrow], settings: Settings, tmp_path: Path) -> Model:
    """A model that has met "cat" (2368), "red" (736) and the comma (267), but neither "unicorn" nor "zeppelin"."""

    def forget(tensors: dict[str, Tensor]) -> None:
        known = [2368, 736, 267, 320, 49406, 49407]
        kept = tensors[TOKENS][known]
        tensors[TOKENS] = torch.zeros_like(tensors[TOKENS])
        tensors[TOKENS][known] = kept

    return gouache.load(altered(narrow("sd1").file, tmp_path / "learner.safetensors", forget), settings=settings)


def test_words_that_the_model_never_met_are_named_once(learner: Model):
    request = Request(prompt="a red cat, unicorn, (zeppelin:1.2)", negative="unicorn")

    told = list(notes(learner, request))

    assert told == ["the model does not know the words unicorn, zeppelin"]


def test_a_model_trained_on_all_words_gets_no_remark(loaded: Callable[[str], Model]):
    assert not list(notes(loaded("sd1"), Request(prompt="a red cat, unicorn", negative="zeppelin")))


def test_grammar_that_is_read_as_text_is_pointed_out(loaded: Callable[[str], Model]):
    request = Request(prompt="a cat <lora:fur:1> <other:fur>", negative="[dog|cow]")

    told = list(notes(loaded("sd1"), request))

    assert told == [
        "<other:fur> in the prompt is read as plain text for now",
        "[dog|cow] in the negative is read as plain text for now",
    ]

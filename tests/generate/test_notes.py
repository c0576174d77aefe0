"""Notes on prompts: parts that are read as plain text, words that the model was never trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import gouache
from gouache import Model
from gouache.app.settings import Settings
from gouache.generate.notes import notes
from gouache.generate.request import Request, Rng
from tests.pipelines import Narrow, altered

TOKENS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


@pytest.fixture
def small_vocabulary(narrow: Callable[[str], Narrow], settings: Settings, tmp_path: Path) -> Model:
    """A model trained on "cat" (2368), "red" (736) and the comma (267), but not on "unicorn" and "zeppelin"."""

    def zero_others(tensors: dict[str, Tensor]) -> None:
        known = [2368, 736, 267, 320, 49406, 49407]
        kept = tensors[TOKENS][known]
        tensors[TOKENS] = torch.zeros_like(tensors[TOKENS])
        tensors[TOKENS][known] = kept

    return gouache.load(altered(narrow("sd1").file, tmp_path / "model.safetensors", zero_others), settings=settings)


@pytest.mark.parametrize(
    "prompt", ["a red cat, unicorn, (zeppelin:1.2)", "a [unicorn:zeppelin:0.5]", "cat AND unicorn AND zeppelin"]
)
def test_words_that_the_model_was_not_trained_on_are_named_once(prompt: str, small_vocabulary: Model):
    found = list(notes(small_vocabulary, Request(prompt=prompt, negative="unicorn")))

    assert found == ["the model does not know the words 'unicorn', 'zeppelin'"]


def test_names_of_embeddings_are_known_words(small_vocabulary: Model):
    assert not list(notes(small_vocabulary, Request(prompt="a red cat, unicorn"), ["unicorn"]))


def test_embeddings_that_are_not_there_are_named_and_no_unknown_words(small_vocabulary: Model):
    assert not list(notes(small_vocabulary, Request(prompt="a red cat, embedding:unicorn"), ["unicorn"]))
    assert list(notes(small_vocabulary, Request(prompt="a red cat, embedding:zeppelin"), ["unicorn"])) == [
        "embedding:zeppelin names no embedding that was found, so it is read as text"
    ]


@pytest.mark.parametrize(
    ("word", "near"), [("cats", "cat"), ("Cats", "cat"), ("redd", "red"), ("zeppelin", ""), ("x" * 5000, "")]
)
def test_plurals_and_misspelt_words_get_a_known_word_proposed(word: str, near: str, small_vocabulary: Model):
    found = list(notes(small_vocabulary, Request(prompt=f"a {word}")))

    assert found == [f"the model does not know the word {word!r}" + (f" (did you mean {near}?)" if near else "")]


def test_a_model_trained_on_the_whole_vocabulary_gets_no_note(loaded: Callable[[str], Model]):
    assert not list(notes(loaded("sd1"), Request(prompt="a red cat, unicorn", negative="zeppelin")))


def test_unknown_tags_are_reported_as_plain_text(loaded: Callable[[str], Model]):
    request = Request(prompt="a cat <lora:fur:1> <other:fur>", negative="[dog|cow] <thing:1>")

    found = list(notes(loaded("sd1"), request))

    assert found == [
        "<other:fur> in the prompt is read as plain text",
        "<thing:1> in the negative is read as plain text",
    ]


@pytest.mark.parametrize("low", [0, 5, 2**32 - 1])
@pytest.mark.parametrize("rng", ["cpu", "nv"])
def test_seeds_that_share_their_noise_with_a_smaller_one_are_reported(
    low: int, rng: Rng, loaded: Callable[[str], Model]
):
    model = loaded("sd1")
    options: dict[str, Any] = {"steps": 1, "size": (64, 64), "cfg": 1, "rng": rng}
    small, large = (next(model.paint("a cat", seed=seed, **options)).latent for seed in (low, low + 2**32))

    def reported(**seeds: int) -> list[str]:
        return [note for note in notes(model, Request(prompt="a cat", rng=rng, **seeds)) if "lower 32 bits" in note]

    shared = torch.equal(small, large)
    assert shared is (rng == "cpu")
    assert len(reported(seed=low + 2**32)) == shared and not reported(seed=low)
    assert len(reported(seed=low, count=2**32 - low + 1) if low == 2**32 - 1 else reported(seed=2**32)) == shared
    assert len(reported(seed=1, variation_seed=low + 2**32)) == shared


@pytest.mark.parametrize(("size", "far"), [(None, 0), ((64, 64), 0), ((96, 64), 0), ((64, 16), 0), ((128, 72), 1)])
def test_sizes_far_from_the_models_are_reported(size: tuple[int, int] | None, far: int, loaded: Callable[[str], Model]):
    found = list(notes(loaded("sd1"), Request(prompt="a cat", size=size)))

    assert len(found) == far and all("the model was made for 64x64" in each for each in found)


def test_a_picture_to_start_from_that_is_scaled_is_reported(loaded: Callable[[str], Model]):
    def reported(size: tuple[int, int]) -> list[str]:
        return list(notes(loaded("sd1"), Request(prompt="a cat", init=Image.new("RGB", size))))  # type: ignore[arg-type]

    assert not reported((64, 72))
    assert reported((100, 60)) == ["init is 100x60; it is scaled to 96x56 for this model (set size for another)"]


@pytest.mark.parametrize(
    ("sampler", "steps", "few"), [("PLMS", 10, 1), ("pndm", 19, 1), ("PLMS", 20, 0), ("Euler", 1, 0)]
)
def test_too_few_steps_for_a_sampler_are_reported(sampler: str, steps: int, few: int, loaded: Callable[[str], Model]):
    found = list(notes(loaded("sd1"), Request(prompt="a cat", sampler=sampler, steps=steps)))

    assert found == ["PLMS needs about 20 steps; with fewer its pictures may be in pieces"] * few


@pytest.mark.parametrize(("level", "black"), [(0, 1), (1, 1), (100, 1), (200, 0), (255, 0)])
def test_a_mask_that_paints_nothing_is_reported(level: int, black: int, loaded: Callable[[str], Model]):
    mask = Image.new("L", (64, 64))
    mask.paste(level, (8, 8, 40, 40))
    request = Request(prompt="a cat", init=Image.new("RGB", (64, 64)), mask=mask)  # type: ignore[arg-type]

    found = list(notes(loaded("sd1"), request))

    assert len(found) == black and all(f"its highest level is {level} of 255" in each for each in found)


@pytest.mark.parametrize(("prompt", "count"), [("a cat:1.5", 1), ("a cat:1.5,", 0), ("a cat :1.5 AND a dog", 0)])
def test_a_number_at_the_end_of_a_prompt_without_and_is_reported_as_a_weight(
    prompt: str, count: int, loaded: Callable[[str], Model]
):
    found = list(notes(loaded("sd1"), Request(prompt=prompt)))

    assert len(found) == count
    assert all("the prompt ends in a weight, which multiplies the guidance by 1.5" in each for each in found)

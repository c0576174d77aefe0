"""`Model.encode_prompts` on the loaded encoders against the definition in float64 on those of Transformers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gouache import Model
from gouache.errors import RequestError
from tests.pipelines import Narrow
from tests.prompt_definition import Chunk, context, plain, pooled

Narrows = Callable[[str], Narrow]
Models = Callable[[str], Model]

PROMPTS: dict[str, tuple[str, list[Chunk]]] = {
    "empty": ("", [[]]),
    "plain": ("a red apple", [plain("a red apple")]),
    "weighted": ("a (red:1.5) [apple] ((tree))", [[("a", 1), ("red", 1.5), ("apple", 1 / 1.1), ("tree", 1.21)]]),
    "escaped": (r"cat \(red\)", [plain("cat (red)")]),
    "two chunks": ("cat " * 80, [plain("cat " * 75), plain("cat " * 5)]),
    "three chunks, cut at a comma": (
        "cat " * 70 + ", (" + "dog " * 90 + ":1.2)",
        [plain("cat " * 70 + ","), [("dog", 1.2)] * 75, [("dog", 1.2)] * 15],
    ),
    "break": ("(cat BREAK dog:0.6) tree", [[("cat", 0.6)], [("dog", 0.6), ("tree", 1)]]),
}
DEFAULT = {"sd1": (1, True), "sd2": (1, True), "sdxl": (2, False)}  # the folder of SD2 lacks the block that is skipped


def encoders(narrow: Narrow) -> list[tuple[Any, Any]]:
    """Transformers' encoders of a narrow model with their tokenizers."""
    pipeline = narrow.pipeline
    second = getattr(pipeline, "text_encoder_2", None)
    first = [(pipeline.text_encoder, pipeline.tokenizer)]
    return first if second is None else [*first, (second, pipeline.tokenizer_2)]


def defined(narrow: Narrow, chunks: list[Chunk], layer: int, norm: bool) -> Tensor:
    return torch.cat([context(*each, chunks, layer=layer, norm=norm) for each in encoders(narrow)], dim=-1)


def assert_close(ours: Tensor, defined: Tensor) -> None:
    torch.testing.assert_close(ours.double(), defined, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("text", "chunks"), PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("family", DEFAULT)
def test_a_prompt_agrees_with_its_definition(
    family: str, text: str, chunks: list[Chunk], narrow: Narrows, loaded: Models
):
    encoded = loaded(family).encode_prompts([text])

    assert_close(encoded.context, defined(narrow(family), chunks, *DEFAULT[family]))


@pytest.mark.parametrize("clip_skip", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_clip_skip_uses_an_earlier_layer(family: str, clip_skip: int, narrow: Narrows, loaded: Models):
    text, chunks = PROMPTS["weighted"]

    encoded = loaded(family).encode_prompts([text], clip_skip=clip_skip)

    assert_close(encoded.context, defined(narrow(family), chunks, clip_skip, DEFAULT[family][1]))


def test_a_clip_skip_beyond_the_first_layer_is_refused(loaded: Models):
    with pytest.raises(RequestError, match="clip_skip: is 5, but the text encoder text_encoder has layers 1 to 4"):
        loaded("sd1").encode_prompts(["a cat"], clip_skip=5)


def test_the_vector_of_sdxl_is_the_pooled_prompt_and_the_sizes(narrow: Narrows, loaded: Models):
    text, chunks = PROMPTS["break"]

    encoded = loaded("sdxl").encode_prompts([text], size=(96, 64))

    # Original height and width, top and left of the crop, target height and width, each as 256 sinusoids.
    rates = torch.tensor([10000 ** (-step / 128) for step in range(128)], dtype=torch.float64)
    angles = torch.tensor([64, 96, 0, 0, 64, 96], dtype=torch.float64)[:, None] * rates
    sizes = torch.cat([angles.cos(), angles.sin()], dim=1).flatten()[None]
    first = [(word, 1.0) for word, _ in chunks[0]]
    expected = torch.cat([pooled(*encoders(narrow("sdxl"))[1], first), sizes], dim=1)
    assert encoded.vector is not None
    torch.testing.assert_close(encoded.vector.double(), expected, rtol=1e-4, atol=1e-4)


def test_an_empty_negative_of_sdxl_is_zero_and_one_with_words_is_not(loaded: Models):
    model = loaded("sdxl")

    empty, blank, words, positive = (
        model.encode_prompts([text], negative=negative)
        for text, negative in (("", True), (" \n", True), ("dog", True), ("", False))
    )

    for encoded in (empty, blank):
        assert encoded.vector is not None
        assert not encoded.context.any() and not encoded.vector[:, :96].any() and encoded.vector[:, 96:].any()
    assert words.context.any() and positive.context.any()


@pytest.mark.parametrize("family", DEFAULT)
def test_prompts_in_one_call_are_encoded_as_they_are_alone(family: str, loaded: Models):
    texts = [PROMPTS["weighted"][0], "", PROMPTS["break"][0]]

    together = loaded(family).encode_prompts(texts)
    alone = [loaded(family).encode_prompts([text]) for text in texts]

    for row, single in zip(together.context, alone):
        torch.testing.assert_close(row[: single.tokens], single.context[0], rtol=1e-5, atol=1e-5)
    assert together.tokens == 77 * 2


def test_a_prompt_with_weight_zero_only_is_finite(loaded: Models):
    encoded = loaded("sd1").encode_prompts(["(cat:0)"])

    assert math.isfinite(float(encoded.context.sum()))


@pytest.mark.parametrize(
    "text", ["BREAK " * 20_000, "1" * 100_000, "<a:" * 40_000, "(a:" + "1" * 100_000, "a " * 60_000]
)
def test_a_prompt_that_is_far_too_long_is_refused_at_once(text: str, loaded: Models):
    start = time.process_time()

    with pytest.raises(RequestError, match=r"^prompt: is too long: \d+ chunks of 75 tokens"):
        loaded("sd1").encode_prompts([text])

    assert time.process_time() - start < 10


def test_ten_thousand_words_are_encoded(loaded: Models):
    assert loaded("sd1").encode_prompts(["cat dog " * 5000]).context.shape[1] == 134 * 77

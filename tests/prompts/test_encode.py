"""`encode` against its definition in float64, and against diffusers' pipelines on the encoders of Transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from gouache.errors import RequestError
from gouache.nn.clip_text import ClipText
from gouache.nn.spec import TextSpec
from gouache.prompts.encode import Emphasis, encode
from gouache.prompts.recipe import EncoderRecipe, TextRecipe
from gouache.prompts.tokenizer import Tokenizer

BEGIN, END = 49406, 49407
CAT, DOG, COMMA = 2368, 1929, 267

SD1 = TextRecipe((EncoderRecipe("clip_l"),))
SD2 = TextRecipe((EncoderRecipe("open_clip", pad_token=0, layer=2),))
SDXL = TextRecipe(
    (EncoderRecipe("clip_l", layer=2, final_norm=False), EncoderRecipe("big_g", 0, layer=2, final_norm=False)),
    pooled="big_g",
    size_ids="sdxl",
    zero_empty_negative=True,
)
REFINER = TextRecipe(SDXL.encoders[1:], pooled="big_g", size_ids="refiner")


@dataclass
class Hidden:
    layers: tuple[Tensor, ...]
    pooled: Tensor


class Toy:
    """A causal text encoder of four blocks in float64, whose norm has a gain and a bias."""

    def __init__(self, seed: int, width: int = 6, pooled: int = 5) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.tokens, self.positions = random(49408, width), random(77, width)
        self.blocks = [random(width, width) / width**0.5 for _ in range(4)]
        self.gain, self.bias, self.projection = 1 + random(width) / 4, random(width), random(width, pooled)

    def norm(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) * self.gain + self.bias

    def __call__(self, tokens: Tensor) -> Hidden:
        assert tokens.dtype == torch.int64 and tokens.shape[1] == 77
        layers = [self.tokens[tokens] + self.positions]
        for block in self.blocks:
            past = layers[-1].cumsum(1) / torch.arange(1, 78, dtype=torch.float64)[:, None]
            layers.append(layers[-1] + torch.tanh(past @ block))
        ends = [row.tolist().index(END) for row in tokens]
        last = self.norm(layers[-1])
        return Hidden(tuple(layers), last[range(len(ends)), ends] @ self.projection)


def definition(
    chunks: list[list[tuple[int, float]]],
    encoder: Toy,
    *,
    pad: int = END,
    layer: int = 1,
    norm: bool = True,
    restore: bool = True,
) -> Tensor:
    """The context (1, 77 * chunks, D) of one prompt, computed by chunk and token."""
    contexts = []
    for chunk in chunks:
        ids = [BEGIN] + [token for token, _ in chunk] + [END]
        weights = [1.0] + [weight for _, weight in chunk] + [1.0]
        hidden = encoder(torch.tensor([ids + [pad] * (77 - len(ids))])).layers[-layer]
        hidden = (encoder.norm(hidden) if norm else hidden)[0]
        weighted = hidden.clone()
        for position, weight in enumerate(weights):
            weighted[position] *= weight
        if restore:
            weighted *= hidden.sum() / weighted.sum()
        contexts.append(weighted)
    return torch.cat(contexts)[None]


def plain(*tokens: int) -> list[tuple[int, float]]:
    return [(token, 1.0) for token in tokens]


LONG = "cat " * 70 + ", (" + "dog " * 90 + ":1.2)"  # 161 tokens, cut at the comma
LONG_CHUNKS = [plain(*[CAT] * 70, COMMA), [(DOG, 1.2)] * 75, [(DOG, 1.2)] * 15]
CASES = {
    "empty": ("", [[]]),
    "unweighted": ("cat, dog", [plain(CAT, COMMA, DOG)]),
    "weighted": ("(cat:1.5) dog [cat]", [[(CAT, 1.5), (DOG, 1.0), (CAT, 1 / 1.1)]]),
    "zero": ("(cat:0) dog", [[(CAT, 0.0), (DOG, 1.0)]]),
    "nested": ("((cat:1.3) dog:0.5)", [[(CAT, 0.65), (DOG, 0.5)]]),
    "two chunks": ("cat " * 80, [plain(*[CAT] * 75), plain(*[CAT] * 5)]),
    "three chunks": (LONG, LONG_CHUNKS),
    "break": ("(cat BREAK dog:1.4) cat", [[(CAT, 1.4)], [(DOG, 1.4), (CAT, 1.0)]]),
}


@pytest.mark.parametrize(("text", "chunks"), CASES.values(), ids=CASES)
def test_a_prompt_agrees_with_the_definition(text: str, chunks, tokenizer: Tokenizer):
    encoder = Toy(1)

    encoded = encode([text], tokenizer, {"clip_l": encoder}, SD1)

    torch.testing.assert_close(encoded.context, definition(chunks, encoder), rtol=1e-12, atol=1e-12)
    assert encoded.vector is None


@pytest.mark.parametrize("clip_skip", [1, 2, 3, 4])
@pytest.mark.parametrize("final_norm", [True, False])
def test_clip_skip_takes_an_earlier_layer_and_keeps_the_norm_rule(
    clip_skip: int, final_norm: bool, tokenizer: Tokenizer
):
    encoder = Toy(2)
    recipe = TextRecipe((EncoderRecipe("clip_l", final_norm=final_norm),))

    encoded = encode([LONG], tokenizer, {"clip_l": encoder}, recipe, clip_skip=clip_skip)

    expected = definition(LONG_CHUNKS, encoder, layer=clip_skip, norm=final_norm)
    torch.testing.assert_close(encoded.context, expected, rtol=1e-12, atol=1e-12)


def test_open_clip_pads_with_zero_and_takes_the_layer_before_the_last_with_the_norm(tokenizer: Tokenizer):
    encoder = Toy(3)

    encoded = encode(["(cat:1.3) dog"], tokenizer, {"open_clip": encoder}, SD2)

    expected = definition([[(CAT, 1.3), (DOG, 1.0)]], encoder, pad=0, layer=2)
    torch.testing.assert_close(encoded.context, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip_skip", [None, 1, 3])
def test_two_encoders_are_concatenated_each_with_its_own_mean(clip_skip: int | None, tokenizer: Tokenizer):
    clip_l, big_g = Toy(4), Toy(5, width=8)

    encoded = encode(
        [LONG], tokenizer, {"big_g": big_g, "clip_l": clip_l}, SDXL, clip_skip=clip_skip, size=(1024, 1024)
    )

    layer = clip_skip or 2
    first = definition(LONG_CHUNKS, clip_l, layer=layer, norm=False)
    second = definition(LONG_CHUNKS, big_g, pad=0, layer=layer, norm=False)
    torch.testing.assert_close(encoded.context, torch.cat([first, second], -1), rtol=1e-12, atol=1e-12)


def test_the_pooled_vector_is_that_of_the_first_chunk_and_last_block_with_any_clip_skip(tokenizer: Tokenizer):
    encoder = Toy(6)
    recipe = TextRecipe((EncoderRecipe("big_g", pad_token=0, layer=2),), pooled="big_g")

    encoded = encode(["(cat:1.5) BREAK cat", "dog"], tokenizer, {"big_g": encoder}, recipe, clip_skip=3)

    rows = torch.tensor([[BEGIN, word, END] + [0] * 74 for word in (CAT, DOG)])
    expected = encoder.norm(encoder(rows).layers[-1])[:, 2] @ encoder.projection
    assert encoded.vector is not None
    torch.testing.assert_close(encoded.vector, expected, rtol=1e-12, atol=1e-12)


def test_emphasis_can_keep_the_weighted_mean_or_ignore_weights(tokenizer: Tokenizer):
    encoder = Toy(7)
    text, chunks = CASES["weighted"]

    kept = encode([text], tokenizer, {"clip_l": encoder}, SD1, emphasis="no norm").context
    ignored = encode([text], tokenizer, {"clip_l": encoder}, SD1, emphasis="ignore").context

    unweighted = [[(token, 1.0) for token, _ in chunk] for chunk in chunks]
    torch.testing.assert_close(kept, definition(chunks, encoder, restore=False), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ignored, definition(unweighted, encoder), rtol=1e-12, atol=1e-12)


def comfy_definition(
    chunks: list[list[tuple[int, float]]], encoder: Toy, *, pad: int = END, layer: int = 1, norm: bool = True
) -> Tensor:
    """The context (1, 77 * chunks, D) by ComfyUI's rule, a row of the encoder and a token at a time."""

    def hidden_states(tokens: list[int]) -> Tensor:
        ids = [BEGIN, *tokens, END]
        hidden = encoder(torch.tensor([ids + [pad] * (77 - len(ids))])).layers[-layer]
        return (encoder.norm(hidden) if norm else hidden)[0]

    empty = hidden_states([])
    contexts = []
    for chunk in chunks:
        rows = list(hidden_states([token for token, _ in chunk]))
        for position, (_, weight) in enumerate(chunk, 1):
            rows[position] = empty[position] * (1 - weight) + rows[position] * weight
        contexts.append(torch.stack(rows))
    return torch.cat(contexts)[None]


@pytest.mark.parametrize(("text", "chunks"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("clip_skip", [None, 2])
def test_comfy_interpolates_from_the_empty_prompt(text: str, chunks, clip_skip: int | None, tokenizer: Tokenizer):
    encoder = Toy(17)

    encoded = encode([text], tokenizer, {"clip_l": encoder}, SD1, clip_skip=clip_skip, emphasis="comfy")

    expected = comfy_definition(chunks, encoder, layer=clip_skip or 1)
    torch.testing.assert_close(encoded.context, expected, rtol=1e-12, atol=1e-12)


def test_comfy_interpolates_each_encoder_with_its_own_empty_prompt_and_leaves_the_pooled_vector(tokenizer: Tokenizer):
    clip_l, big_g = Toy(18), Toy(19, width=8)
    encoders = {"clip_l": clip_l, "big_g": big_g}
    texts = [LONG, "(cat:1.4) dog"]

    encoded = encode(texts, tokenizer, encoders, SDXL, size=(64, 64), emphasis="comfy")
    ignored = encode(texts, tokenizer, encoders, SDXL, size=(64, 64), emphasis="ignore")

    assert encoded.vector is not None and ignored.vector is not None
    for row, chunks in enumerate([LONG_CHUNKS, [[(CAT, 1.4), (DOG, 1.0)], [], []]]):
        first = comfy_definition(chunks, clip_l, layer=2, norm=False)
        second = comfy_definition(chunks, big_g, pad=0, layer=2, norm=False)
        expected = torch.cat([first, second], -1)
        torch.testing.assert_close(encoded.context[row : row + 1], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(encoded.vector, ignored.vector, rtol=1e-12, atol=1e-12)


def test_comfy_changes_nothing_without_weights(tokenizer: Tokenizer):
    encoder = Toy(20)
    texts = ["cat, dog", LONG]

    mixed = encode(texts, tokenizer, {"clip_l": encoder}, SD1, emphasis="comfy").context
    plain_prompt = encode(texts[:1], tokenizer, {"clip_l": encoder}, SD1, emphasis="comfy").context

    assert torch.equal(plain_prompt, encode(texts[:1], tokenizer, {"clip_l": encoder}, SD1, emphasis="ignore").context)
    torch.testing.assert_close(mixed[:1, :77], plain_prompt, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("text", ["(cat:1.5) [dog]", r"a \(cat\) BREAK dog", "((cat"])
def test_emphasis_none_reads_the_prompt_as_plain_text(text: str, tokenizer: Tokenizer):
    encoder = Toy(21)

    encoded = encode([text], tokenizer, {"clip_l": encoder}, SD1, emphasis="none")

    expected = definition([plain(*tokenizer.encode(text))], encoder)
    torch.testing.assert_close(encoded.context, expected, rtol=1e-12, atol=1e-12)


MODES = get_args(Emphasis)


def narrow_encoders() -> dict[str, ClipText]:
    def narrow(seed: int) -> ClipText:
        spec = TextSpec(width=8, layers=3, heads=1, mlp_width=8, projection=4)
        return randomized(ClipText(spec), seed).double()

    return {"clip_l": narrow(0), "big_g": narrow(1)}


@pytest.mark.parametrize("emphasis", MODES)
@pytest.mark.parametrize("clip_skip", [None, 1, 3])
def test_gradients_of_embedding_vectors_equal_finite_differences(
    emphasis: Emphasis, clip_skip: int | None, tokenizer: Tokenizer
):
    encoders = narrow_encoders()
    generator = torch.Generator().manual_seed(22)
    first, second = (torch.randn(2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    readout = torch.randn(2 * 77 * 16, generator=generator, dtype=torch.float64) / 50

    def loss(first: Tensor, second: Tensor) -> Tensor:
        encoded = encode(
            ["a (myword:1.3), [cat]", "myword BREAK (dog:0.4)"],
            tokenizer,
            encoders,
            replace(SDXL, zero_empty_negative=False),
            clip_skip=clip_skip,
            size=(64, 64),
            emphasis=emphasis,
            embeddings={"myword": {"clip_l": first, "big_g": second}},
        )
        assert encoded.vector is not None
        return torch.tanh(encoded.context[:, :77].flatten() @ readout) + encoded.vector[:, :4].sin().sum()

    inputs = first.requires_grad_(), second.requires_grad_()
    gradients = torch.autograd.grad(loss(*inputs), inputs)
    assert all(gradient.abs().min() > 0 for gradient in gradients)
    for _ in range(3):
        step = [1e-6 * torch.randn(2, 8, generator=generator, dtype=torch.float64) for _ in inputs]
        with torch.no_grad():
            difference = loss(first + step[0], second + step[1]) - loss(first - step[0], second - step[1])
        predicted = 2 * sum((gradient * part).sum() for gradient, part in zip(gradients, step))
        torch.testing.assert_close(difference, predicted, rtol=1e-5, atol=1e-13)


@pytest.mark.parametrize("emphasis", MODES)
def test_gradients_are_finite_where_hidden_states_have_mean_zero(emphasis: Emphasis, tokenizer: Tokenizer):
    encoder = narrow_encoders()["clip_l"]
    with torch.no_grad():
        encoder.text_model.final_layer_norm.weight.zero_()
        encoder.text_model.final_layer_norm.bias.zero_()
    vectors = torch.ones(1, 8, dtype=torch.float64, requires_grad=True)

    encoded = encode(
        ["(myword:1.5) cat"],
        tokenizer,
        {"clip_l": encoder},
        SD1,
        emphasis=emphasis,
        embeddings={"myword": {"clip_l": vectors}},
    )

    (gradient,) = torch.autograd.grad(encoded.context.sum(), vectors)
    assert gradient.isfinite().all()


def test_an_embedding_replaces_the_vectors_of_its_tokens(tokenizer: Tokenizer):
    encoder = narrow_encoders()["clip_l"]
    vectors = encoder.embed(torch.tensor([CAT, DOG]))

    embedded = encode(
        ["a (myword:1.5)"],
        tokenizer,
        {"clip_l": encoder},
        SD1,
        emphasis="comfy",
        embeddings={"myword": {"clip_l": vectors}},
    )

    written = encode(["a (cat dog:1.5)"], tokenizer, {"clip_l": encoder}, SD1, emphasis="comfy")
    torch.testing.assert_close(embedded.context, written.context, rtol=1e-12, atol=1e-12)


def test_a_hidden_state_of_mean_zero_stays_finite(tokenizer: Tokenizer):
    encoder = Toy(8)
    encoder.gain, encoder.bias = torch.zeros_like(encoder.gain), torch.zeros_like(encoder.bias)

    encoded = encode(["a (cat:1.5)"], tokenizer, {"clip_l": encoder}, SD1)

    assert torch.equal(encoded.context, torch.zeros(1, 77, 6, dtype=torch.float64))


def test_a_prompt_is_encoded_alike_in_any_batch(tokenizer: Tokenizer):
    encoder = Toy(9)
    texts = ["(cat:1.5), dog", "dog", "[dog] cat"]

    together = encode(texts, tokenizer, {"clip_l": encoder}, SD1).context

    alone = [encode([text], tokenizer, {"clip_l": encoder}, SD1).context for text in texts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-13, atol=1e-13)


def test_shorter_prompts_of_a_batch_are_padded_with_the_empty_prompt(tokenizer: Tokenizer):
    encoder = Toy(10)

    encoded = encode([LONG, "(cat:1.5)"], tokenizer, {"clip_l": encoder}, SD1)

    empty = encode([""], tokenizer, {"clip_l": encoder}, SD1)
    short = encode(["(cat:1.5)"], tokenizer, {"clip_l": encoder}, SD1)
    torch.testing.assert_close(encoded.context[1:], short.pad_to(3, empty.context).context, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(encoded.context[1:], definition([[(CAT, 1.5)], [], []], encoder), rtol=1e-12, atol=1e-12)


def test_an_empty_negative_is_zeros_for_a_family_trained_that_way(tokenizer: Tokenizer):
    encoders = {"clip_l": Toy(11), "big_g": Toy(12)}

    encoded = encode(["", "dog"], tokenizer, encoders, SDXL, negative=True, size=(64, 64))
    positive = encode(["", "dog"], tokenizer, encoders, SDXL, size=(64, 64))
    other_family = encode([""], tokenizer, {"clip_l": Toy(11)}, SD1, negative=True)

    assert encoded.vector is not None and positive.vector is not None
    assert not encoded.context[0].any() and not encoded.vector[0, :5].any()
    assert torch.equal(encoded.vector[:, 5:], positive.vector[:, 5:])  # the sizes are unchanged
    assert torch.equal(encoded.context[1], positive.context[1]) and torch.equal(encoded.vector[1], positive.vector[1])
    assert positive.context[0].any() and positive.vector[0, :5].any() and other_family.context.any()


def test_size_numbers_are_sinusoids_with_cosines_first_in_the_trained_order(tokenizer: Tokenizer):
    encoders = {"clip_l": Toy(13), "big_g": Toy(14)}
    options: dict[str, Any] = {"size": (640, 384), "original": (1920, 1080), "crop": (7, 3), "aesthetic": 2.5}

    base = encode(["dog"], tokenizer, encoders, SDXL, **options).vector
    refiner = encode(["dog"], tokenizer, encoders, REFINER, **options).vector

    def sinusoid(number: float) -> list[float]:
        angles = [number / 10000 ** (k / 128) for k in range(128)]
        return [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]

    def sinusoids(*numbers: float) -> Tensor:
        return torch.tensor([[value for number in numbers for value in sinusoid(number)]], dtype=torch.float64)

    assert base is not None and refiner is not None
    assert base.shape == (1, 5 + 6 * 256) and refiner.shape == (1, 5 + 5 * 256)
    torch.testing.assert_close(base[:, 5:], sinusoids(1080, 1920, 3, 7, 384, 640), rtol=0, atol=2e-4)  # float32 angles
    torch.testing.assert_close(refiner[:, 5:], sinusoids(1080, 1920, 3, 7, 2.5), rtol=0, atol=2e-4)


def test_the_original_size_defaults_to_the_size(tokenizer: Tokenizer):
    encoders = {"clip_l": Toy(15), "big_g": Toy(16)}

    default = encode(["dog"], tokenizer, encoders, SDXL, size=(640, 384)).vector
    explicit = encode(["dog"], tokenizer, encoders, SDXL, size=(640, 384), original=(640, 384)).vector

    assert default is not None and explicit is not None
    assert torch.equal(default, explicit)


@pytest.mark.parametrize("clip_skip", [0, -1, 5])
def test_a_clip_skip_beyond_the_layers_is_refused(clip_skip: int, tokenizer: Tokenizer):
    with pytest.raises(RequestError, match=r"clip_skip: is -?\d, .* layers 1 to 4"):
        encode(["dog"], tokenizer, {"clip_l": Toy(1)}, SD1, clip_skip=clip_skip)


def test_an_unknown_emphasis_and_a_missing_size_are_refused(tokenizer: Tokenizer):
    encoders = {"clip_l": Toy(1), "big_g": Toy(2)}

    with pytest.raises(RequestError, match="'loud' is not one of 'original', 'no norm', 'ignore', 'none', 'comfy'"):
        encode(["dog"], tokenizer, encoders, SD1, emphasis="loud")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="size: is missing"):
        encode(["dog"], tokenizer, encoders, SDXL)


def test_clip_text_is_an_encoder_and_keeps_half_precision(tokenizer: Tokenizer):
    encoder = randomized(ClipText(TextSpec(width=64, layers=2, heads=1, mlp_width=64, projection=32)), 0).bfloat16()
    recipe = replace(SD2, pooled="open_clip")

    encoded = encode(["(cat:1.5), dog", "dog"], tokenizer, {"open_clip": encoder}, recipe, emphasis="no norm")

    tokens = torch.tensor([[BEGIN, CAT, COMMA, DOG, END] + [0] * 72, [BEGIN, DOG, END] + [0] * 74])
    output = encoder(tokens)
    expected = encoder.norm(output.layers[1])
    expected[0, 1] *= 1.5
    assert encoded.context.dtype == torch.bfloat16 and encoded.vector is not None
    assert torch.equal(encoded.context, expected)
    assert torch.equal(encoded.vector, output.pooled)


class Transformers:
    """A text model of Transformers in the form that `encode` calls."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.norm = next(module for name, module in model.named_modules() if name.endswith("final_layer_norm"))

    def __call__(self, tokens: Tensor) -> Hidden:
        output = self.model(tokens, output_hidden_states=True)
        pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
        return Hidden(output.hidden_states, pooled)


def tiny(kind: str, seed: int, **changes: Any) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        projection_dim=24,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=1,
        **changes,
    )
    return randomized(getattr(transformers, kind)(config).eval(), seed)


def randomized(module: Any, seed: int) -> Any:
    """`module` with random parameters, larger than its initial ones, so that layers differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.requires_grad_(False).parameters():
        parameter.normal_(0, 0.2, generator=generator)
    return module


def clip_tokenizer(folder: Path, pad_token: str) -> Any:
    from transformers import CLIPTokenizerFast

    return CLIPTokenizerFast.from_pretrained(folder, pad_token=pad_token)


@pytest.mark.parametrize("clip_skip", [None, 1, 2, 3])
def test_sd1_agrees_with_diffusers(clip_skip: int | None, tokenizer: Tokenizer, clip_folder: Path):
    from diffusers import StableDiffusionPipeline

    text_model = tiny("CLIPTextModel", 20)
    if not hasattr(text_model, "text_model"):  # diffusers' clip skip reads it, transformers 5 has removed it
        text_model.__dict__["text_model"] = text_model
    absent: dict[str, Any] = dict.fromkeys(["vae", "unet", "scheduler", "safety_checker", "feature_extractor"])
    pipeline: Any = StableDiffusionPipeline(
        text_encoder=text_model,
        tokenizer=clip_tokenizer(clip_folder, "<|endoftext|>"),
        requires_safety_checker=False,
        **absent,
    )
    prompts, negatives = ["a photo of a cat, 4k", "two dogs"], ["", "blurry"]

    encoded = encode(prompts, tokenizer, {"clip_l": Transformers(text_model)}, SD1, clip_skip=clip_skip)
    negative = encode(negatives, tokenizer, {"clip_l": Transformers(text_model)}, SD1, negative=True)

    # diffusers counts the layers that are skipped, and leaves the negative prompt as it is
    skipped = None if clip_skip in (None, 1) else clip_skip - 1
    expected, unskipped = pipeline.encode_prompt(
        prompts, torch.device("cpu"), 1, True, negative_prompt=negatives, clip_skip=skipped
    )
    torch.testing.assert_close(encoded.context, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(negative.context, unskipped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("negatives", [None, ["", "blurry"]])
def test_sdxl_agrees_with_diffusers(negatives: list[str] | None, tokenizer: Tokenizer, clip_folder: Path):
    from diffusers import StableDiffusionXLPipeline
    from diffusers.models.embeddings import Timesteps

    clip_l = tiny("CLIPTextModel", 21)
    big_g = tiny("CLIPTextModelWithProjection", 22, hidden_act="gelu")
    absent: dict[str, Any] = dict.fromkeys(["vae", "unet", "scheduler"])
    pipeline: Any = StableDiffusionXLPipeline(
        text_encoder=clip_l,
        text_encoder_2=big_g,
        tokenizer=clip_tokenizer(clip_folder, "<|endoftext|>"),
        tokenizer_2=clip_tokenizer(clip_folder, "!"),
        add_watermarker=False,
        **absent,
    )
    prompts = ["a photo of a cat, 4k", "two dogs"]
    encoders = {"clip_l": Transformers(clip_l), "big_g": Transformers(big_g)}
    options: dict[str, Any] = {"size": (1152, 896), "original": (1920, 1080), "crop": (16, 8)}
    recipe = SDXL if negatives is None else replace(SDXL, zero_empty_negative=False)  # diffusers zeroes None only

    encoded = encode(prompts, tokenizer, encoders, SDXL, **options)
    negative = encode(negatives or ["", ""], tokenizer, encoders, recipe, negative=True, **options)

    context, negative_context, pooled, negative_pooled = pipeline.encode_prompt(
        prompts, device=torch.device("cpu"), negative_prompt=negatives
    )
    unet = SimpleNamespace(
        config=SimpleNamespace(addition_time_embed_dim=256),
        add_embedding=SimpleNamespace(linear_1=SimpleNamespace(in_features=24 + 6 * 256)),
    )
    pipeline_class: Any = StableDiffusionXLPipeline
    ids = pipeline_class._get_add_time_ids(
        SimpleNamespace(unet=unet), (1080, 1920), (8, 16), (896, 1152), torch.float32, 24
    )
    sinusoids = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(ids.flatten()).flatten()
    sinusoids = sinusoids.expand(2, -1)
    assert encoded.vector is not None and negative.vector is not None
    torch.testing.assert_close(encoded.context, context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(negative.context, negative_context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoded.vector, torch.cat([pooled, sinusoids], -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(negative.vector, torch.cat([negative_pooled, sinusoids], -1), rtol=1e-5, atol=1e-5)

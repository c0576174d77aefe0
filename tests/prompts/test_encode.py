"""`encode` against its definition in float64, and against diffusers' pipelines on the encoders of Transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gouache.errors import RequestError
from gouache.nn.clip_text import ClipText
from gouache.nn.spec import TextSpec
from gouache.prompts.encode import encode
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

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.tokens, self.positions = draw(49408, width), draw(77, width)
        self.blocks = [draw(width, width) / width**0.5 for _ in range(4)]
        self.gain, self.bias, self.projection = 1 + draw(width) / 4, draw(width), draw(width, pooled)

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
    """The context (1, 77 * chunks, D) of one prompt, a chunk and a token at a time."""
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

    told = encode([text], tokenizer, {"clip_l": encoder}, SD1)

    torch.testing.assert_close(told.context, definition(chunks, encoder), rtol=1e-12, atol=1e-12)
    assert told.vector is None


@pytest.mark.parametrize("clip_skip", [1, 2, 3, 4])
@pytest.mark.parametrize("final_norm", [True, False])
def test_clip_skip_takes_an_earlier_layer_and_keeps_the_norm_rule(
    clip_skip: int, final_norm: bool, tokenizer: Tokenizer
):
    encoder = Toy(2)
    recipe = TextRecipe((EncoderRecipe("clip_l", final_norm=final_norm),))

    told = encode([LONG], tokenizer, {"clip_l": encoder}, recipe, clip_skip=clip_skip)

    expected = definition(LONG_CHUNKS, encoder, layer=clip_skip, norm=final_norm)
    torch.testing.assert_close(told.context, expected, rtol=1e-12, atol=1e-12)


def test_open_clip_pads_with_zero_and_takes_the_layer_before_the_last_with_the_norm(tokenizer: Tokenizer):
    encoder = Toy(3)

    told = encode(["(cat:1.3) dog"], tokenizer, {"open_clip": encoder}, SD2)

    expected = definition([[(CAT, 1.3), (DOG, 1.0)]], encoder, pad=0, layer=2)
    torch.testing.assert_close(told.context, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip_skip", [None, 1, 3])
def test_two_encoders_stand_side_by_side_each_with_its_own_mean(clip_skip: int | None, tokenizer: Tokenizer):
    clip_l, big_g = Toy(4), Toy(5, width=8)

    told = encode([LONG], tokenizer, {"big_g": big_g, "clip_l": clip_l}, SDXL, clip_skip=clip_skip, size=(1024, 1024))

    layer = clip_skip or 2
    first = definition(LONG_CHUNKS, clip_l, layer=layer, norm=False)
    second = definition(LONG_CHUNKS, big_g, pad=0, layer=layer, norm=False)
    torch.testing.assert_close(told.context, torch.cat([first, second], -1), rtol=1e-12, atol=1e-12)


def test_the_pooled_vector_is_the_first_chunks_from_the_last_block_whatever_the_clip_skip(tokenizer: Tokenizer):
    encoder = Toy(6)
    recipe = TextRecipe((EncoderRecipe("big_g", pad_token=0, layer=2),), pooled="big_g")

    told = encode(["(cat:1.5) BREAK cat", "dog"], tokenizer, {"big_g": encoder}, recipe, clip_skip=3)

    rows = torch.tensor([[BEGIN, word, END] + [0] * 74 for word in (CAT, DOG)])
    expected = encoder.norm(encoder(rows).layers[-1])[:, 2] @ encoder.projection
    assert told.vector is not None
    torch.testing.assert_close(told.vector, expected, rtol=1e-12, atol=1e-12)


def test_emphasis_can_keep_the_weighted_mean_or_ignore_weights(tokenizer: Tokenizer):
    encoder = Toy(7)
    text, chunks = CASES["weighted"]

    kept = encode([text], tokenizer, {"clip_l": encoder}, SD1, emphasis="no norm").context
    ignored = encode([text], tokenizer, {"clip_l": encoder}, SD1, emphasis="ignore").context

    unweighted = [[(token, 1.0) for token, _ in chunk] for chunk in chunks]
    torch.testing.assert_close(kept, definition(chunks, encoder, restore=False), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ignored, definition(unweighted, encoder), rtol=1e-12, atol=1e-12)


def test_a_hidden_state_of_mean_zero_stays_finite(tokenizer: Tokenizer):
    encoder = Toy(8)
    encoder.gain, encoder.bias = torch.zeros_like(encoder.gain), torch.zeros_like(encoder.bias)

    told = encode(["a (cat:1.5)"], tokenizer, {"clip_l": encoder}, SD1)

    assert torch.equal(told.context, torch.zeros(1, 77, 6, dtype=torch.float64))


def test_a_prompt_means_the_same_in_any_batch(tokenizer: Tokenizer):
    encoder = Toy(9)
    texts = ["(cat:1.5), dog", "dog", "[dog] cat"]

    together = encode(texts, tokenizer, {"clip_l": encoder}, SD1).context

    alone = [encode([text], tokenizer, {"clip_l": encoder}, SD1).context for text in texts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-13, atol=1e-13)


def test_shorter_prompts_of_a_batch_are_filled_with_the_empty_prompt(tokenizer: Tokenizer):
    encoder = Toy(10)

    told = encode([LONG, "(cat:1.5)"], tokenizer, {"clip_l": encoder}, SD1)

    empty = encode([""], tokenizer, {"clip_l": encoder}, SD1)
    short = encode(["(cat:1.5)"], tokenizer, {"clip_l": encoder}, SD1)
    torch.testing.assert_close(told.context[1:], short.pad_to(3, empty.context).context, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(told.context[1:], definition([[(CAT, 1.5)], [], []], encoder), rtol=1e-12, atol=1e-12)


def test_an_empty_negative_is_zeros_where_the_family_says_so(tokenizer: Tokenizer):
    encoders = {"clip_l": Toy(11), "big_g": Toy(12)}

    told = encode(["", "dog"], tokenizer, encoders, SDXL, negative=True, size=(64, 64))
    positive = encode(["", "dog"], tokenizer, encoders, SDXL, size=(64, 64))
    other_family = encode([""], tokenizer, {"clip_l": Toy(11)}, SD1, negative=True)

    assert told.vector is not None and positive.vector is not None
    assert not told.context[0].any() and not told.vector[0, :5].any()
    assert torch.equal(told.vector[:, 5:], positive.vector[:, 5:])  # the sizes are told all the same
    assert torch.equal(told.context[1], positive.context[1]) and torch.equal(told.vector[1], positive.vector[1])
    assert positive.context[0].any() and positive.vector[0, :5].any() and other_family.context.any()


def test_size_numbers_are_sinusoids_cosines_first_in_the_trained_order(tokenizer: Tokenizer):
    encoders = {"clip_l": Toy(13), "big_g": Toy(14)}
    knobs: dict[str, Any] = {"size": (640, 384), "original": (1920, 1080), "crop": (7, 3), "aesthetic": 2.5}

    base = encode(["dog"], tokenizer, encoders, SDXL, **knobs).vector
    refiner = encode(["dog"], tokenizer, encoders, REFINER, **knobs).vector

    def sinusoid(number: float) -> list[float]:
        angles = [number / 10000 ** (k / 128) for k in range(128)]
        return [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]

    def told(*numbers: float) -> Tensor:
        return torch.tensor([[value for number in numbers for value in sinusoid(number)]], dtype=torch.float64)

    assert base is not None and refiner is not None
    assert base.shape == (1, 5 + 6 * 256) and refiner.shape == (1, 5 + 5 * 256)
    torch.testing.assert_close(base[:, 5:], told(1080, 1920, 3, 7, 384, 640), rtol=0, atol=2e-4)  # float32 angles
    torch.testing.assert_close(refiner[:, 5:], told(1080, 1920, 3, 7, 2.5), rtol=0, atol=2e-4)


def test_the_original_size_defaults_to_the_size(tokenizer: Tokenizer):
    encoders = {"clip_l": Toy(15), "big_g": Toy(16)}

    default = encode(["dog"], tokenizer, encoders, SDXL, size=(640, 384)).vector
    spelled = encode(["dog"], tokenizer, encoders, SDXL, size=(640, 384), original=(640, 384)).vector

    assert default is not None and spelled is not None
    assert torch.equal(default, spelled)


@pytest.mark.parametrize("clip_skip", [0, -1, 5])
def test_a_clip_skip_that_no_layer_answers_is_refused(clip_skip: int, tokenizer: Tokenizer):
    with pytest.raises(RequestError, match=r"clip_skip: is -?\d, .* layers 1 to 4"):
        encode(["dog"], tokenizer, {"clip_l": Toy(1)}, SD1, clip_skip=clip_skip)


def test_an_unknown_emphasis_and_a_missing_size_are_refused(tokenizer: Tokenizer):
    encoders = {"clip_l": Toy(1), "big_g": Toy(2)}

    with pytest.raises(RequestError, match="'loud' is none of 'original', 'no norm', 'ignore'"):
        encode(["dog"], tokenizer, encoders, SD1, emphasis="loud")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="size: is missing"):
        encode(["dog"], tokenizer, encoders, SDXL)


def test_our_own_encoder_fits_and_keeps_half_precision(tokenizer: Tokenizer):
    encoder = redrawn(ClipText(TextSpec(width=64, layers=2, heads=1, mlp_width=64, projection=32)), 0).bfloat16()
    recipe = replace(SD2, pooled="open_clip")

    told = encode(["(cat:1.5), dog", "dog"], tokenizer, {"open_clip": encoder}, recipe, emphasis="no norm")

    tokens = torch.tensor([[BEGIN, CAT, COMMA, DOG, END] + [0] * 72, [BEGIN, DOG, END] + [0] * 74])
    output = encoder(tokens)
    expected = encoder.norm(output.layers[1])
    expected[0, 1] *= 1.5
    assert told.context.dtype == torch.bfloat16 and told.vector is not None
    assert torch.equal(told.context, expected)
    assert torch.equal(told.vector, output.pooled)


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
    return redrawn(getattr(transformers, kind)(config).eval(), seed)


def redrawn(module: Any, seed: int) -> Any:
    """All parameters drawn anew, far from their near-zero start, so that layers differ."""
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
    if not hasattr(text_model, "text_model"):  # where diffusers' clip skip looks, and transformers 5 has it no more
        text_model.__dict__["text_model"] = text_model
    absent: dict[str, Any] = dict.fromkeys(["vae", "unet", "scheduler", "safety_checker", "feature_extractor"])
    pipeline: Any = StableDiffusionPipeline(
        text_encoder=text_model,
        tokenizer=clip_tokenizer(clip_folder, "<|endoftext|>"),
        requires_safety_checker=False,
        **absent,
    )
    prompts, negatives = ["a photo of a cat, 4k", "two dogs"], ["", "blurry"]

    told = encode(prompts, tokenizer, {"clip_l": Transformers(text_model)}, SD1, clip_skip=clip_skip)
    negative = encode(negatives, tokenizer, {"clip_l": Transformers(text_model)}, SD1, negative=True)

    # diffusers counts the layers that are skipped, and leaves the negative prompt as it is
    skipped = None if clip_skip in (None, 1) else clip_skip - 1
    expected, unskipped = pipeline.encode_prompt(
        prompts, torch.device("cpu"), 1, True, negative_prompt=negatives, clip_skip=skipped
    )
    torch.testing.assert_close(told.context, expected, rtol=1e-5, atol=1e-5)
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
    knobs: dict[str, Any] = {"size": (1152, 896), "original": (1920, 1080), "crop": (16, 8)}
    recipe = SDXL if negatives is None else replace(SDXL, zero_empty_negative=False)  # diffusers zeroes None only

    told = encode(prompts, tokenizer, encoders, SDXL, **knobs)
    negative = encode(negatives or ["", ""], tokenizer, encoders, recipe, negative=True, **knobs)

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
    assert told.vector is not None and negative.vector is not None
    torch.testing.assert_close(told.context, context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(negative.context, negative_context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(told.vector, torch.cat([pooled, sinusoids], -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(negative.vector, torch.cat([negative_pooled, sinusoids], -1), rtol=1e-5, atol=1e-5)

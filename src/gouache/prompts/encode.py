"""Prompts to `Conditioning`: chunks of tokens through the family's text encoders, then weighted and concatenated.

A chunk is begin, up to 75 tokens, end, padding: 77 positions. All chunks go through an encoder as one batch; the
chunks of a prompt are then concatenated along the tokens, the encoders along the width. Weights act on the hidden
states, not on the tokens. Everything is differentiable, down to the vectors of embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from gouache.diffusion.conditioning import Conditioning
from gouache.errors import RequestError
from gouache.nn.blocks import timestep_embedding
from gouache.prompts.chunks import CHUNK_TOKENS, Chunk, chunk
from gouache.prompts.grammar import MAX_WEIGHT
from gouache.prompts.recipe import EncoderRecipe, SizeIds, TextRecipe
from gouache.prompts.tokenizer import Tokenizer

Emphasis = Literal["original", "no norm", "ignore", "none", "comfy"]
"""How weights act on the hidden states. The first four are the settings of A1111's web UI, the last is ComfyUI's rule.

"original": multiply, then restore the mean. "no norm": multiply. "ignore": weights are read but have no effect.
"none": the whole prompt is plain text, brackets, backslashes and BREAK included. "comfy": w * hidden +
(1 - w) * the hidden state of the empty prompt at the same position; prompts are still read as A1111 reads them, in
ComfyUI square brackets are text and nested explicit weights do not multiply.
"""


MAX_CHUNKS = 200  # 15,000 tokens; prompts come from strangers, and time and memory grow with their length


@dataclass(frozen=True)
class Sizes:
    """SDXL's micro-conditioning of a picture, in pixels (Podell et al. 2023, section 2.2).

    `size` (width, height) is that of the picture, `original` (width, height) what it was scaled from (None: `size`),
    `crop` (left, top) what was cut off there. `aesthetic`, 0 to 10, replaces `size` in the refiner.
    """

    size: tuple[int, int]
    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    aesthetic: float = 6.0


class TextHidden(Protocol):
    """A text encoder's output for (B, 77) tokens; `nn.clip_text.TextOutput` is the implementation."""

    @property
    def layers(self) -> tuple[Tensor, ...]:
        """The embedded tokens and every block's output, (B, 77, D) each, before the final norm."""
        ...

    @property
    def pooled(self) -> Tensor:
        """(B, P): the last block's normed output at the end token, projected where there is a projection."""
        ...


class TextEncoder(Protocol):
    def __call__(self, tokens: Tensor, vectors: Tensor | None = None) -> TextHidden: ...

    def embed(self, tokens: Tensor) -> Tensor:
        """The tokens' embedding vectors, (B, 77, D), without positions."""
        ...

    def norm(self, x: Tensor) -> Tensor:
        """The final layer norm."""
        ...


def encode(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    encoders: Mapping[str, TextEncoder],
    recipe: TextRecipe,
    *,
    clip_skip: int | None = None,
    size: tuple[int, int] | None = None,
    original: tuple[int, int] | None = None,
    crop: tuple[int, int] = (0, 0),
    aesthetic: float = 6.0,
    sizes: Sequence[Sizes] | None = None,
    pooled_only: bool = False,
    emphasis: Emphasis = "original",
    negative: bool = False,
    embeddings: Mapping[str, Mapping[str, Tensor]] | None = None,
    device: torch.device | str = "cpu",
) -> Conditioning:
    """The conditioning of B prompts: context (B, 77 * chunks, D), and vector (B, V) if the family has one.

    All prompts get as many chunks as the longest needs; the others are filled up with chunks of the empty prompt.
    Apart from that, each is encoded as if it were alone.

    `clip_skip` n selects every encoder's n-th hidden state from the end instead of the family's default. `size`
    (width, height) is the size of the picture, `original` (width, height) the size it claims to have been scaled from
    (None: `size`), `crop` (left, top) what was cut off; all in pixels. `aesthetic`, 0 to 10, is the refiner's score;
    2.5 is usual for a negative prompt. `sizes`, one per prompt, replace these four. `pooled_only`: if there are none,
    `vector` is the pooled text alone, for `add_sizes`. `negative`: these are negative prompts. `embeddings`
    {name: {encoder: (vectors, D)}} replace their names in the prompts. `device` is the encoders' device.

    Raises RequestError for an unknown emphasis, a prompt of more than `MAX_CHUNKS` chunks, a layer that an encoder
    does not have, or a missing size.
    """
    if emphasis not in get_args(Emphasis):
        names = ", ".join(repr(name) for name in get_args(Emphasis))
        raise RequestError("emphasis", f"{emphasis!r} is not one of {names}")

    embeddings = embeddings or {}
    counts = {name: len(next(iter(vectors.values()))) for name, vectors in embeddings.items()}
    split = [chunk(text, tokenizer, counts, plain=emphasis == "none") for text in texts]
    count = max(len(each) for each in split)
    if count > MAX_CHUNKS:
        raise RequestError(
            "prompt", f"is too long: {count} chunks of {CHUNK_TOKENS} tokens; expected at most {MAX_CHUNKS}"
        )
    rows = [part for each in split for part in [*each, *[[]] * (count - len(each))]]  # B * chunks
    weights = _weights(rows)
    if not bool((weights.abs() <= MAX_WEIGHT).all()):
        largest = float(weights.abs().max())
        raise RequestError("prompt", f"has a weight of {largest:g} on some words; expected at most {MAX_WEIGHT:g}")
    # ComfyUI's rule needs the empty prompt too; without weights it changes nothing and need not be encoded.
    interpolate = emphasis == "comfy" and bool((weights != 1).any())
    empty_rows: list[Chunk] = [[]] if interpolate else []

    contexts: list[Tensor] = []
    vector: Tensor | None = None
    for part in recipe.encoders:
        encoder = encoders[part.name]
        tokens = _tokens([*rows, *empty_rows], tokenizer, part).to(device)
        vectors = _vectors(rows, tokens, encoder, part.name, embeddings)
        output = encoder(tokens) if vectors is None else encoder(tokens, vectors)
        hidden = _hidden(output, encoder, part, clip_skip)
        if interpolate:
            hidden = _interpolate(hidden[: len(rows)], weights, hidden[len(rows) :])
        elif emphasis in ("original", "no norm"):
            hidden = _emphasize(hidden, weights, restore_mean=emphasis == "original")
        contexts.append(hidden.reshape(len(texts), -1, hidden.shape[-1]))
        if part.name == recipe.pooled:
            vector = output.pooled[: len(rows) : count]  # of each prompt's first chunk; weights do not apply
    context = torch.cat(contexts, dim=-1)

    if negative and recipe.zero_empty_negative:
        empty = torch.tensor([not text.strip() for text in texts], device=context.device)
        context = context.masked_fill(empty[:, None, None], 0)
        vector = None if vector is None else vector.masked_fill(empty[:, None], 0)
    text = Conditioning(context, vector)
    if sizes is None and size is not None:
        sizes = [Sizes(size, original, crop, aesthetic)] * len(texts)
    return add_sizes(text, recipe, sizes) if sizes is not None or not pooled_only else text


def add_sizes(text: Conditioning, recipe: TextRecipe, sizes: Sequence[Sizes] | None) -> Conditioning:
    """`text`, encoded without sizes, with those of each row; unchanged for a family that does not use them.

    Raises RequestError if it uses them and there are none.
    """
    if text.vector is None or recipe.size_ids is None:
        return text
    if sizes is None:
        raise RequestError("size", "is missing; this model family needs the picture's width and height")
    numbers = [_size_numbers(recipe.size_ids, each) for each in sizes]
    sinusoids = timestep_embedding(torch.tensor(numbers, device=text.vector.device).flatten(), recipe.size_width)
    return replace(text, vector=torch.cat([text.vector, sinusoids.to(text.vector.dtype).reshape(len(sizes), -1)], -1))


def _tokens(rows: list[Chunk], tokenizer: Tokenizer, part: EncoderRecipe) -> Tensor:
    """(rows, 77) int64."""
    pad = tokenizer.end if part.pad_token is None else part.pad_token
    return torch.tensor(
        [
            [tokenizer.begin, *(token.id for token in row), tokenizer.end, *[pad] * (CHUNK_TOKENS - len(row))]
            for row in rows
        ]
    )


def _vectors(
    rows: list[Chunk], tokens: Tensor, encoder: TextEncoder, name: str, embeddings: Mapping[str, Mapping[str, Tensor]]
) -> Tensor | None:
    """(len(tokens), 77, D): the tokens' vectors, the embeddings' at their positions; None if there are none."""
    found = [(r, c, token.vector) for r, row in enumerate(rows) for c, token in enumerate(row, 1) if token.vector]
    if not found:
        return None
    vectors = encoder.embed(tokens)
    row_numbers = torch.tensor([row for row, _, _ in found], device=vectors.device)
    columns = torch.tensor([column for _, column, _ in found], device=vectors.device)
    values = torch.stack([embeddings[embedding][name][number].to(vectors) for _, _, (embedding, number) in found])
    return vectors.index_put((row_numbers, columns), values)


def _weights(rows: list[Chunk]) -> Tensor:
    """(rows, 77); begin, end and padding have weight 1."""
    return torch.tensor(
        [[1.0, *(token.weight for token in row), *[1.0] * (CHUNK_TOKENS + 1 - len(row))] for row in rows],
        dtype=torch.float64,
    )


def _hidden(output: TextHidden, encoder: TextEncoder, part: EncoderRecipe, clip_skip: int | None) -> Tensor:
    layer = part.layer if clip_skip is None else clip_skip
    blocks = len(output.layers) - 1
    if not 1 <= layer <= blocks:
        raise RequestError("clip_skip", f"is {layer}, but the text encoder {part.name} has layers 1 to {blocks}")
    hidden = output.layers[-layer]
    return encoder.norm(hidden) if part.final_norm else hidden


def _emphasize(hidden: Tensor, weights: Tensor, *, restore_mean: bool) -> Tensor:
    """hidden (rows, 77, D), each token times its weight (rows, 77).

    A1111 restores the mean over all rows that it encodes at once, usually those of one prompt. Here it is always each
    row's own mean, so that a prompt means the same in any batch.
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    weighted = wide * weights.to(wide.dtype).to(wide.device)[:, :, None]
    if restore_mean:
        before, after = wide.mean(dim=(1, 2), keepdim=True), weighted.mean(dim=(1, 2), keepdim=True)
        equal = before == after
        # Factor 1 where both are equal, also where both are 0. The inner `where` keeps 0 / 0 out of the gradient.
        weighted = weighted * torch.where(equal, 1, before / torch.where(equal, 1, after))
    return weighted.to(hidden.dtype)


def _interpolate(hidden: Tensor, weights: Tensor, empty: Tensor) -> Tensor:
    """hidden (rows, 77, D) moved away from `empty` (1, 77, D) by weights (rows, 77): empty + w * (hidden - empty).

    ComfyUI does this with the hidden states of each encoder, after clip skip and the final norm, and compares every
    chunk with the same empty prompt. Tokens of weight 1 keep their exact values.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    wide, start = hidden.to(dtype), empty.to(dtype)
    factors = weights.to(dtype).to(wide.device)[:, :, None]
    return torch.where(factors == 1, wide, start + factors * (wide - start)).to(hidden.dtype)


def _size_numbers(ids: SizeIds, sizes: Sizes) -> list[float]:
    """The numbers in the order that the weights were trained with."""
    last = (sizes.aesthetic,) if ids == "refiner" else reversed(sizes.size)
    return [float(number) for number in (*reversed(sizes.original or sizes.size), *reversed(sizes.crop), *last)]

"""Prompts to `Conditioning`: chunks of tokens through the family's text encoders, weighted, side by side.

A chunk is begin, up to 75 tokens, end, padding: 77 positions. All chunks go through an encoder as one batch; those of
a prompt are then joined along the tokens. Weights multiply the hidden states, as in A1111's web UI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from gouache.diffusion.conditioning import Conditioning
from gouache.errors import RequestError
from gouache.nn.blocks import timestep_embedding
from gouache.prompts.chunks import CHUNK_TOKENS, Chunk, chunk
from gouache.prompts.recipe import EncoderRecipe, SizeIds, TextRecipe
from gouache.prompts.tokenizer import Tokenizer

Emphasis = Literal["original", "no norm", "ignore"]
"""What weights do. "original": multiply, then restore the mean; "no norm": multiply; "ignore": nothing."""


class TextHidden(Protocol):
    """What a text encoder says of (B, 77) tokens; `nn.clip_text.TextOutput` is the one implementation."""

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
        """The tokens' own vectors, (B, 77, D)."""
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
    emphasis: Emphasis = "original",
    negative: bool = False,
    embeddings: Mapping[str, Mapping[str, Tensor]] | None = None,
    device: torch.device | str = "cpu",
) -> Conditioning:
    """What B prompts tell the denoiser: context (B, 77 * chunks, D), and vector (B, V) if the family has one.

    All prompts get as many chunks as the longest needs; the others are filled up with chunks of the empty prompt.
    Apart from that, each is encoded as if it were alone.

    `clip_skip` n takes every encoder's n-th hidden state from the end in place of the family's. `size` (width, height)
    is what will be painted, `original` (width, height) what the picture pretends to have been scaled from (None: the
    same), `crop` (left, top) how much was cut off; pixels. `aesthetic`, 0 to 10, is the refiner's score; 2.5 is usual
    in a negative. `negative` says that these are negative prompts. `embeddings` {name: {encoder: (vectors, D)}} stand
    in for their names. `device` is where the encoders are.

    Raises RequestError for a clip skip, emphasis or size that cannot be followed.
    """
    if emphasis not in get_args(Emphasis):
        names = ", ".join(repr(name) for name in get_args(Emphasis))
        raise RequestError("emphasis", f"{emphasis!r} is none of {names}")

    embeddings = embeddings or {}
    counts = {name: len(next(iter(vectors.values()))) for name, vectors in embeddings.items()}
    split = [chunk(text, tokenizer, counts) for text in texts]
    count = max(len(each) for each in split)
    rows = [part for each in split for part in [*each, *[[]] * (count - len(each))]]  # B * chunks
    weights = _weights(rows)

    contexts: list[Tensor] = []
    vector: Tensor | None = None
    for part in recipe.encoders:
        encoder = encoders[part.name]
        tokens = _tokens(rows, tokenizer, part).to(device)
        vectors = _vectors(rows, tokens, encoder, part.name, embeddings)
        output = encoder(tokens) if vectors is None else encoder(tokens, vectors)
        hidden = _hidden(output, encoder, part, clip_skip)
        if emphasis != "ignore":
            hidden = _emphasize(hidden, weights, restore_mean=emphasis == "original")
        contexts.append(hidden.reshape(len(texts), -1, hidden.shape[-1]))
        if part.name == recipe.pooled:
            vector = output.pooled[::count]  # of each prompt's first chunk
    context = torch.cat(contexts, dim=-1)

    if negative and recipe.zero_empty_negative:
        wordless = torch.tensor([not text.strip() for text in texts], device=context.device)
        context = context.masked_fill(wordless[:, None, None], 0)
        vector = None if vector is None else vector.masked_fill(wordless[:, None], 0)
    if vector is not None and recipe.size_ids is not None:
        if size is None:
            raise RequestError("size", "is missing; this family is told the picture's width and height")
        numbers = _size_numbers(recipe.size_ids, size, original or size, crop, aesthetic)
        sinusoids = timestep_embedding(torch.tensor(numbers, device=vector.device), recipe.size_width)
        vector = torch.cat([vector, sinusoids.to(vector.dtype).flatten().expand(len(texts), -1)], dim=-1)
    return Conditioning(context, vector)


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
    """(rows, 77, D) with the embeddings' vectors in their places; None where there are none."""
    places = [(r, c, token.vector) for r, row in enumerate(rows) for c, token in enumerate(row, 1) if token.vector]
    if not places:
        return None
    vectors = encoder.embed(tokens).clone()
    for row, column, (embedding, number) in places:
        vectors[row, column] = embeddings[embedding][name][number].to(vectors)
    return vectors


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

    A1111 restores the mean over the rows that it encodes at once: usually the one prompt's. Here it is always each
    row's own, so that a prompt means the same in any batch.
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    weighted = wide * weights.to(wide.dtype).to(wide.device)[:, :, None]
    if restore_mean:
        before, after = wide.mean(dim=(1, 2), keepdim=True), weighted.mean(dim=(1, 2), keepdim=True)
        weighted = weighted * torch.where(before == after, 1, before / after)  # 1 also where both are 0
    return weighted.to(hidden.dtype)


def _size_numbers(
    ids: SizeIds, size: tuple[int, int], original: tuple[int, int], crop: tuple[int, int], aesthetic: float
) -> list[float]:
    """SDXL's micro-conditioning (Podell et al. 2023, section 2.2), in the order its weights were trained with."""
    last = (aesthetic,) if ids == "refiner" else reversed(size)
    return [float(number) for number in (*reversed(original), *reversed(crop), *last)]

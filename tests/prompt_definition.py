"""The encoding of a weighted prompt of several chunks, in float64 with the text encoders of Transformers.

Written from the definition, without Gouache's code: a chunk is begin, its words, end, padding; its hidden states are
multiplied by the weights of their words and then scaled back to their original mean; chunks are concatenated.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

BEGIN, END = 49406, 49407

Chunk = list[tuple[str, float]]
"""Words with their weights."""


def plain(words: str) -> Chunk:
    return [(word, 1.0) for word in words.split()]


def context(encoder: Any, tokenizer: Any, chunks: list[Chunk], *, layer: int, norm: bool) -> Tensor:
    """(1, 77 * chunks, D) float64: the `layer`-th hidden state from the end, through the final norm if `norm`."""
    encoder = copy.deepcopy(encoder).double()
    final_norm = dict(encoder.named_modules())[_final_norm(encoder)]
    contexts = []
    for chunk in chunks:
        ids, weights = _ids(tokenizer, chunk)
        with torch.inference_mode():
            hidden = encoder(ids, output_hidden_states=True).hidden_states[-layer]
            hidden = final_norm(hidden) if norm else hidden
        weighted = hidden * weights[None, :, None]
        contexts.append(weighted * (hidden.mean() / weighted.mean()))
    return torch.cat(contexts, dim=1)


def pooled(encoder: Any, tokenizer: Any, chunk: Chunk) -> Tensor:
    """(1, P) float64: the projected vector of a prompt's first chunk."""
    ids, _ = _ids(tokenizer, chunk)
    with torch.inference_mode():
        return copy.deepcopy(encoder).double()(ids).text_embeds


def _ids(tokenizer: Any, chunk: Chunk) -> tuple[Tensor, Tensor]:
    ids, weights = [BEGIN], [1.0]
    for word, weight in chunk:
        tokens = tokenizer(word, add_special_tokens=False).input_ids
        ids += tokens
        weights += [weight] * len(tokens)
    padding = 77 - len(ids) - 1
    ids += [END] + [tokenizer.pad_token_id] * padding
    weights += [1.0] * (1 + padding)
    return torch.tensor([ids]), torch.tensor(weights, dtype=torch.float64)


def _final_norm(encoder: Any) -> str:
    """The name of the final norm, which newer releases of Transformers do not prefix with `text_model.`."""
    return next(name for name, _ in encoder.named_modules() if name.split(".")[-1] == "final_layer_norm")

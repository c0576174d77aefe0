"""Remarks on a request that is fine but may not do what its author thinks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from gouache.generate.request import Request
from gouache.model.model import Model
from gouache.prompts.grammar import Break, flatten, parse, unsupported


def notes(model: Model, request: Request) -> Iterator[str]:
    """One line each: parts of the prompt language that are read as plain text, words the model never met."""
    for name, text in (("prompt", request.prompt), ("negative", request.negative)):
        if parts := unsupported(text):
            yield f"{', '.join(parts)} in the {name} is read as plain text for now"
    if words := unknown_words(model, [request.prompt, request.negative]):
        yield f"the model does not know the words {', '.join(words)}"


def unknown_words(model: Model, prompts: Iterable[str]) -> list[str]:
    """Words of `prompts` of which some token still has the vector that untrained tokens share.

    Such a vector is zero. Published models were trained on all of their vocabulary and have none.
    """
    encoder = next(iter(model.text_encoders.values()))
    table = encoder.text_model.embeddings.token_embedding.weight
    unmet = dict[str, None]()
    for text in (run[0] for prompt in prompts for run in flatten(parse(prompt)) if not isinstance(run, Break)):
        for word, tokens in model.tokenizer.words(text):
            rows = table[torch.tensor(tokens, device=table.device)]
            if any(character.isalnum() for character in word) and bool((rows == 0).all(dim=1).any()):
                unmet[word] = None
    return list(unmet)

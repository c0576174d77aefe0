"""Remarks on a request that is fine but may not do what its author thinks."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

import torch

from gouache.generate.request import Request
from gouache.generate.splices import Spliced
from gouache.model.model import Model
from gouache.prompts.grammar import Break, flatten, parse, unsupported
from gouache.prompts.tags import take_tags
from gouache.workshop.details import trigger_words


def notes(model: Model, request: Request, embeddings: Container[str] = ()) -> Iterator[str]:
    """One line each: parts of the prompt language that are read as plain text, words the model never met.

    `embeddings`: names that will be known when it is painted.
    """
    prompt, _ = take_tags(request.prompt)
    for name, text in (("prompt", prompt), ("negative", request.negative)):
        if parts := unsupported(text):
            yield f"{', '.join(parts)} in the {name} is read as plain text for now"
    words = unknown_words(model, [prompt, request.negative])
    if words := [word for word in words if word not in embeddings]:
        yield f"the model does not know the words {', '.join(words)}"


def splice_notes(request: Request, splices: Iterable[Spliced]) -> Iterator[str]:
    """A LoRA of which no trigger word stands in the prompt; an embedding that no prompt calls."""
    said = " ".join(take_tags(request.prompt)[0].casefold().split())
    every = f"{said} {request.negative.casefold()}"
    for each in splices:
        if each.attached is None:
            continue
        if each.kind == "lora":
            words = trigger_words(each.attached.file.metadata)
            if words and not any(word.casefold() in said for word in words):
                yield f"{each.path.stem} was trained with the words {', '.join(words)}; the prompt has none of them"
        unused = [word for word in each.attached.words if word.casefold() not in every]
        if unused:
            yield f"{', '.join(unused)} stands in no prompt, so the embedding changes nothing; write its name there"


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

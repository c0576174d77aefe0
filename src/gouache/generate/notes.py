"""Notes on a valid request that may not do what its author expects."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator

import torch

from gouache.generate.adapters import UsedFile
from gouache.generate.prompting import read_prompts
from gouache.generate.request import Request
from gouache.model.model import Model
from gouache.prompts.grammar import Break, flatten, parse, unsupported
from gouache.prompts.schedule import composed
from gouache.prompts.tags import take_tags
from gouache.workshop.details import trigger_words


def notes(model: Model, request: Request, embeddings: Container[str] = ()) -> Iterator[str]:
    """One line each: unknown tags, words that the model was never trained on.

    `embeddings`: names that the request will add.
    """
    prompt, _ = take_tags(request.prompt)
    hires_prompt, _ = take_tags(request.hires_prompt)
    for name, text in (
        ("prompt", prompt), ("negative", request.negative),
        ("hires prompt", hires_prompt), ("hires negative", request.hires_negative),
    ):  # fmt: skip
        if parts := unsupported(text):
            yield f"{', '.join(parts)} in the {name} is read as plain text"
    for part in composed(prompt):
        if part.weight != 1 and " AND " not in f" {prompt} ":
            yield (
                f"the prompt ends in a weight, which multiplies the guidance by {part.weight:g}; end it with a comma "
                f"to keep the number as text"
            )
    words = unknown_words(model, _texts(request, prompt))
    if words := [word for word in words if word not in embeddings]:
        quoted = ", ".join(repr(word) for word in words)
        yield f"the model does not know the word{'s' * (len(words) > 1)} {quoted}"


def _texts(request: Request, prompt: str) -> list[str]:
    """Every text that is encoded at some step."""
    both = [read_prompts(prompt, request.negative, request.steps)]
    if request.hires is not None:
        second = take_tags(request.hires_prompt)[0] or prompt, request.hires_negative or request.negative
        both.append(read_prompts(*second, request.hires_steps or request.steps, base_steps=request.steps))
    texts = [text for prompts in both for _, timeline in prompts.positive for text in timeline.values]
    texts = [re.sub(r"\bembedding:", "", text) for text in texts]  # ComfyUI's way to name one
    return list(dict.fromkeys([*texts, *(text for prompts in both for text in prompts.negative.values)]))


def adapter_notes(request: Request, used: Iterable[UsedFile]) -> Iterator[str]:
    """A LoRA none of whose trigger words is in the prompt; an embedding that no prompt names."""
    texts = (take_tags(request.prompt)[0], take_tags(request.hires_prompt)[0])
    prompt = " ".join(" ".join(texts).casefold().split())
    every = f"{prompt} {request.negative.casefold()} {request.hires_negative.casefold()}"
    for each in used:
        if each.attached is None:
            continue
        if each.kind == "lora":
            words = trigger_words(each.attached.file.metadata)
            if words and not any(word.casefold() in prompt for word in words):
                yield f"{each.path.stem} was trained with the words {', '.join(words)}; the prompt has none of them"
        unused = [name for name in each.attached.embeddings if name.casefold() not in every]
        if unused:
            names = ", ".join(unused)
            yield f"no prompt contains {names}, so the embedding changes nothing; write its name in the prompt"


def unknown_words(model: Model, prompts: Iterable[str]) -> list[str]:
    """Words of `prompts` with a token that was never trained: its vector is zero.

    Published models were trained on their whole vocabulary and have no such token.
    """
    encoder = next(iter(model.text_encoders.values()))
    table = encoder.text_model.embeddings.token_embedding.weight
    unknown = dict[str, None]()
    for text in (run[0] for prompt in prompts for run in flatten(parse(prompt)) if not isinstance(run, Break)):
        for word, tokens in model.tokenizer.words(text):
            rows = table[torch.tensor(tokens, device=table.device)]
            if any(character.isalnum() for character in word) and bool((rows == 0).all(dim=1).any()):
                unknown[word] = None
    return list(unknown)

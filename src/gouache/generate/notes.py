"""Notes on a valid request that may not do what its author expects."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator

import torch

from gouache.generate.adapters import UsedFile
from gouache.generate.prompting import read_prompts, split_prompt
from gouache.generate.request import Request
from gouache.generate.source import pass_size
from gouache.model.model import Model
from gouache.prompts.grammar import Break, flatten, parse, unsupported
from gouache.prompts.schedule import composed
from gouache.prompts.tags import strip_comments
from gouache.workshop.details import trigger_words


def notes(model: Model, request: Request, embeddings: Container[str] = ()) -> Iterator[str]:
    """One line each: unknown tags, words that the model was never trained on.

    `embeddings`: names that the request will add.
    """
    prompt, _ = split_prompt(request.prompt)
    hires_prompt, _ = split_prompt(request.hires_prompt)
    for name, text in (
        ("prompt", prompt), ("negative", strip_comments(request.negative)),
        ("hires prompt", hires_prompt), ("hires negative", strip_comments(request.hires_negative)),
    ):  # fmt: skip
        if parts := unsupported(text):
            yield f"{', '.join(parts)} in the {name} is read as plain text"
    for part in composed(prompt):
        if part.weight != 1 and " AND " not in f" {prompt} ":
            yield (
                f"the prompt ends in a weight, which multiplies the guidance by {part.weight:g}; end it with a comma "
                f"to keep the number as text"
            )
    yield from unused_settings(model, request)
    words = unknown_words(model, _texts(request, prompt))
    if words := [word for word in words if word not in embeddings]:
        quoted = ", ".join(repr(word) for word in words)
        yield f"the model does not know the word{'s' * (len(words) > 1)} {quoted}"


def unused_settings(model: Model, request: Request) -> Iterator[str]:
    """Settings that have no effect without another one, or with this model."""
    default = Request()
    for names, used, why in (
        (("strength",), request.init is not None, "without init"),
        (("image_cfg",), model.variant == "instruct-pix2pix", f"with a {model.variant} model"),
        (("depth",), model.variant == "depth", f"with a {model.variant} model"),
        (("variation_seed",), bool(request.variation_strength), "without variation_strength"),
        (
            ("hires_steps", "hires_strength", "hires_upscaler", "hires_sampler", "hires_schedule", "hires_prompt",
             "hires_negative"), request.hires is not None, "without hires",
        ),
        (("refiner_at",), request.refiner is not None, "without refiner"),
    ):  # fmt: skip
        for name in names:
            if not used and getattr(request, name) != getattr(default, name):
                yield f"{name} has no effect {why}"
    if request.init is not None and request.size is None:
        size = pass_size(model, request)
        if size[0] < request.init.size[0] - 7:
            width, height = request.init.size
            yield f"init is {width}x{height}; it is scaled to {size[0]}x{size[1]} for this model (set size for another)"


def _texts(request: Request, prompt: str) -> list[str]:
    """Every text that is encoded at some step."""
    both = [read_prompts(prompt, strip_comments(request.negative), request.steps)]
    if request.hires is not None:
        second = (
            split_prompt(request.hires_prompt)[0] or prompt,
            strip_comments(request.hires_negative or request.negative),
        )
        both.append(read_prompts(*second, request.hires_steps or request.steps, base_steps=request.steps))
    texts = [text for prompts in both for _, timeline in prompts.positive for text in timeline.values]
    texts = [re.sub(r"\bembedding:", "", text) for text in texts]  # ComfyUI's way to name one
    return list(dict.fromkeys([*texts, *(text for prompts in both for text in prompts.negative.values)]))


def adapter_notes(request: Request, used: Iterable[UsedFile]) -> Iterator[str]:
    """A LoRA none of whose trigger words is in the prompt; an embedding that no prompt names."""
    texts = (split_prompt(request.prompt)[0], split_prompt(request.hires_prompt)[0])
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

"""Notes on a valid request that may not do what its author expects."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gouache.diffusion.samplers import catalog
from gouache.errors import printable
from gouache.generate.adapters import UsedFile
from gouache.generate.memory import check_memory
from gouache.generate.prompting import read_texts, split_prompt
from gouache.generate.request import Request
from gouache.generate.source import pass_size
from gouache.images import pixels
from gouache.model.model import Model
from gouache.prompts import embedding_names
from gouache.prompts.grammar import escape, unsupported
from gouache.prompts.schedule import composed
from gouache.prompts.tags import strip_comments
from gouache.workshop.details import trigger_words

SEED_BITS = 2**32  # torch's generator on a CPU is the Mersenne twister, which is seeded with 32 bits


def notes(model: Model, request: Request, embeddings: Iterable[str] = ()) -> Iterator[str]:
    """One line each: unknown tags, settings without effect, words that the model was never trained on.

    `embeddings`: names that the request will add.
    """
    prompt, _ = split_prompt(request.prompt)
    hires_prompt, _ = split_prompt(request.hires_prompt)
    for name, text in (
        ("prompt", prompt), ("negative", strip_comments(request.negative)),
        ("hires prompt", hires_prompt), ("hires negative", strip_comments(request.hires_negative)),
    ):  # fmt: skip
        if parts := unsupported(text):
            yield f"{', '.join(printable(part, 80) for part in parts)} in the {name} is read as plain text"
    for part in composed(prompt):
        if part.weight != 1 and " AND " not in f" {prompt} ":
            yield (
                f"the prompt ends in a weight, which multiplies the guidance by {part.weight:g}; end it with a comma "
                f"to keep the number as text"
            )
    yield from unused_settings(model, request)
    texts, names = read_texts(request), [*embeddings, *model.embeddings]
    for text in texts:
        for part, name in embedding_names.split(text, names):
            for missing in re.findall(r"\bembedding:([^\s,]+)", part) if name is None else ():
                yield f"embedding:{printable(missing, 80)} names no embedding that was found, so it is read as text"
    words = unknown_words(model, [re.sub(r"\bembedding:\S+", "", text) for text in texts], names)
    if words:
        quoted = ", ".join(f"{word!r} (did you mean {near}?)" if near else repr(word) for word, near in words.items())
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
    size = pass_size(model, request)
    check_memory(model, size, min(request.batch, request.count))
    if request.init is not None and request.size is None and size != request.init.size:
        width, height = request.init.size
        yield f"init is {width}x{height}; it is scaled to {size[0]}x{size[1]} for this model (set size for another)"
    if request.mask is not None:
        highest = int(np.asarray(pixels.as_mask(request.mask.image)).max())
        if highest < 128:
            yield (
                f"the mask is black, so that nothing is painted: its highest level is {highest} of 255, and 255 is "
                f"painted"
            )
    share = size[0] * size[1] / (model.size[0] * model.size[1])
    if request.init is None and share > 2:
        yield (
            f"the model was made for {model.size[0]}x{model.size[1]}; at {size[0]}x{size[1]} it may draw things in "
            f"pieces or several times"
        )
    sampler, _ = catalog.find(request.sampler, request.schedule)
    if request.steps < sampler.least_steps:
        yield f"{sampler.name} needs about {sampler.least_steps} steps; with fewer its pictures may be in pieces"
    for name in ("seed", "variation_seed"):
        seed = getattr(request, name)
        if request.rng == "cpu" and seed is not None and seed + request.count > SEED_BITS:
            last = seed + request.count - 1
            yield (
                f"{name} {last} gives the noise of {last % SEED_BITS}: with rng cpu only the lower 32 bits of a seed "
                f"count; with rng nv all do"
            )


def adapter_notes(request: Request, used: Iterable[UsedFile]) -> Iterator[str]:
    """A LoRA none of whose trigger words is in the prompt; an embedding that no prompt names."""
    texts = (split_prompt(request.prompt)[0], split_prompt(request.hires_prompt)[0])
    prompt = " ".join(" ".join(texts).casefold().split())
    attached = [each for each in used if each.attached is not None]
    every = [name for each in attached if each.attached is not None for name in each.attached.embeddings]
    found = embedding_names.used(read_texts(request), every)
    for each in attached:
        assert each.attached is not None
        if each.kind == "lora":
            words = trigger_words(each.attached.file.metadata)
            if words and not any(word.casefold() in prompt for word in words):
                yield f"{each.path.stem} was trained with the words {', '.join(words)}; the prompt has none of them"
        unused = [name for name in each.attached.embeddings if name not in found]
        if unused:
            written = ", ".join(map(escape, unused))
            yield (
                f"no prompt contains {', '.join(unused)}, so the embedding changes nothing; write {written} in the "
                f"prompt"
            )


def unescaped_names(request: Request, names: Iterable[str]) -> Iterator[str]:
    """Embeddings among `names`, found in the prompts as written, whose brackets or backslashes are read otherwise."""
    special = [name for name in names if escape(name) != name]
    found = embedding_names.used(read_texts(request), special)
    for name in special:
        if name not in found:
            yield f"the embedding {name} is not used: in a prompt its name is written {escape(name)}"


def unknown_words(model: Model, texts: Iterable[str], embeddings: Iterable[str] = ()) -> dict[str, str]:
    """Words of `texts` with a token that was never trained, whose vector is zero: {word: a similar known word, or ""}.

    `texts` are without weights and escapes (`read_texts`); names of `embeddings` in them are no words. Published
    models were trained on their whole vocabulary and have no such token.
    """
    encoder = next(iter(model.text_encoders.values()))
    table = encoder.text_model.embeddings.token_embedding.weight
    names = list(embeddings)
    trained: list[bool] = (table != 0).any(dim=1).tolist()

    def is_known(tokens: Sequence[int]) -> bool:
        return all(trained[token] for token in tokens)

    unknown = dict[str, None]()
    for text in texts:
        for part, name in embedding_names.split(text, names):
            for word, tokens in model.tokenizer.words(part) if name is None else ():
                if any(character.isalnum() for character in word) and not is_known(tokens):
                    unknown[word] = None
    if not unknown:
        return {}
    entries = (model.tokenizer.token(token) or "" for token, is_trained in enumerate(trained) if is_trained)
    known = [entry.removesuffix("</w>") for entry in entries if entry.endswith("</w>") and entry[:-4].isalpha()]

    def similar(word: str) -> str:
        for singular in _singulars(word.lower()):
            if is_known(model.tokenizer.encode(singular)):
                return singular
        return next(iter(difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.8)), "")

    return {word: similar(word) for word in unknown}


def _singulars(word: str) -> Iterator[str]:
    """What `word` may be the plural of."""
    for ending, singular in (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""), ("men", "man")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            yield word.removesuffix(ending) + singular

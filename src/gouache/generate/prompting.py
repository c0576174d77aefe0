"""The prompts of a pass as conditionings over its steps: scheduled words, parts joined by AND, equal lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.guidance import Term
from gouache.diffusion.timeline import Timeline
from gouache.generate.request import Request
from gouache.model.model import Model
from gouache.prompts.encode import Emphasis
from gouache.prompts.grammar import Break, parse
from gouache.prompts.schedule import composed, scheduled
from gouache.prompts.tags import Tag, strip_comments, take_tags


@dataclass(frozen=True)
class Prompts:
    """`positive` (weight, text over the steps) are the parts joined by AND; A1111 does not split the negative."""

    positive: tuple[tuple[float, Timeline[str]], ...]
    negative: Timeline[str]

    @property
    def changes(self) -> bool:
        """Whether any text changes from step to step."""
        return self.negative.changes or any(text.changes for _, text in self.positive)


@dataclass(frozen=True, eq=False)
class Guides:
    """The conditionings of one step, one row each."""

    positive: tuple[Term, ...]
    negative: Conditioning


def split_prompt(text: str) -> tuple[str, list[Tag]]:
    """(the prompt without comments and tags, the tags)"""
    return take_tags(strip_comments(text))


def read_prompts(prompt: str, negative: str, steps: int, *, base_steps: int | None = None) -> Prompts:
    """`prompt` without tags, over `steps`; `base_steps` are those of the first pass if this is the hires pass."""

    def timeline(text: str) -> Timeline[str]:
        return Timeline(tuple((span.last, span.text) for span in scheduled(text, steps, base_steps=base_steps)))

    return Prompts(tuple((part.weight, timeline(part.text)) for part in composed(prompt)), timeline(negative))


def read_texts(request: Request) -> list[str]:
    """Every text that is encoded at some step of `request`, each once, in runs of equal weight.

    Without comments, tags, weights and escapes: the text that names of embeddings and words are looked up in.
    """
    prompt, negative = split_prompt(request.prompt)[0], strip_comments(request.negative)
    passes = [read_prompts(prompt, negative, request.steps)]
    if request.hires is not None:
        hires_prompt = split_prompt(request.hires_prompt)[0] or prompt
        hires_negative = strip_comments(request.hires_negative) or negative
        steps = request.hires_steps or request.steps
        passes.append(read_prompts(hires_prompt, hires_negative, steps, base_steps=request.steps))
    texts = [text for prompts in passes for _, timeline in prompts.positive for text in timeline.values]
    texts += [text for prompts in passes for text in prompts.negative.values]
    if request.emphasis == "none":
        return list(dict.fromkeys(texts))
    return list(dict.fromkeys(run[0] for text in texts for run in parse(text) if not isinstance(run, Break)))


def encode_prompts(
    model: Model,
    prompts: Prompts,
    *,
    size: tuple[int, int],
    clip_skip: int | None,
    emphasis: Emphasis,
    concat: Tensor | None,
) -> Callable[[int], Guides]:
    """The conditionings by step, 1 for the first. Every text is encoded here, once, however often it returns."""
    encoded: dict[tuple[str, bool], Conditioning] = {}

    def encode(text: str, negative: bool) -> Conditioning:
        if (text, negative) not in encoded:
            encoded[text, negative] = model.encode_prompts(
                [text], negative=negative, clip_skip=clip_skip, size=size, emphasis=emphasis
            )
        return encoded[text, negative]

    def guides(texts: tuple[str, ...], negative_text: str) -> Guides:
        positive = [encode(text, False) for text in texts]
        negative = encode(negative_text, True)
        tokens = max(each.tokens for each in positive)
        positive = [each.extend_to(tokens) for each in positive]
        chunks = max(tokens, negative.tokens) // 77
        if tokens < negative.tokens:
            positive = [each.pad_to(chunks, encode("", False).context) for each in positive]
        elif negative.tokens < tokens:
            # An empty negative prompt may be zeros (SDXL); only such a one is filled up with zeros.
            negative = negative.pad_to(chunks, encode("", not negative_text.strip()).context)
        if concat is not None:
            positive = [replace(each, concat=concat) for each in positive]
            negative = replace(negative, concat=concat)
        weights = (weight for weight, _ in prompts.positive)
        return Guides(tuple(Term(each, weight) for each, weight in zip(positive, weights)), negative)

    made: dict[tuple[tuple[str, ...], str], Guides] = {}

    def at(step: int) -> Guides:
        key = tuple(text.at(step) for _, text in prompts.positive), prompts.negative.at(step)
        if key not in made:
            made[key] = guides(*key)
        return made[key]

    lasts = [
        last for timeline in (prompts.negative, *(text for _, text in prompts.positive)) for last, _ in timeline.spans
    ]
    for step in sorted(set(lasts)):
        at(step)
    return at

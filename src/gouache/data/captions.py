"""The caption of a picture as it is used in one step: dropout, wildcards, shuffled and dropped tags.

The options and their order are those of kohya's scripts, with three differences: a wildcard line gets prefix and suffix
whichever line it is, the fences of `keep_tokens_separator` never remain in the text, and empty tags are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch

from gouache.data.record import CaptionOptions, Record
from gouache.data.templates import fill

_ALTERNATIVES = re.compile(r"\{([^}]+)\}")
_OPEN, _CLOSE = "\0", "\1"  # for {{ and }}, which are braces, until the alternatives are chosen


def caption(
    record: Record, epoch: int, generator: torch.Generator, step: int | None = None, steps: int | None = None
) -> str:
    """The caption of `record` in one use. The same arguments, and state of the generator, give the same caption.

    `epoch` counts from 0. `step` of `steps` is the progress of the run, for the warm-up of tags; None: it is over.
    """
    options = record.caption_options
    if _dropped(options, epoch, generator):
        return ""
    lines = record.captions or ("",)
    text = _choose(lines, generator) if options.wildcard else lines[0]
    if options.templates:
        text = fill(_choose(options.templates, generator), text)
    text = _in_frame(text, options)
    if options.wildcard:
        text = _with_alternatives(text, lambda values: _choose(values, generator))
    text = _with_tags_changed(text, options, generator, step, steps)
    if options.secondary_separator:
        text = text.replace(options.secondary_separator, options.separator)
    return text


def longest(record: Record) -> tuple[str, ...]:
    """The captions with all their tags, in order, and the longest of all alternatives; several for wildcards and
    templates."""
    options = record.caption_options
    lines = record.captions or ("",)
    lines = lines if options.wildcard else lines[:1]
    if options.templates:
        lines = tuple(fill(template, line) for template in options.templates for line in lines)
    if not options.wildcard:
        return tuple(_in_frame(line, options) for line in lines)
    return tuple(_with_alternatives(_in_frame(line, options), lambda values: max(values, key=len)) for line in lines)


def is_constant(options: CaptionOptions) -> bool:
    """Whether a caption with these options is the same each time, apart from dropout: it has one variant to encode."""
    varies = options.shuffle or options.tag_dropout or options.wildcard or options.warmup_steps
    return not varies and len(options.templates) < 2


def _dropped(options: CaptionOptions, epoch: int, generator: torch.Generator) -> bool:
    if options.dropout > 0 and _random(generator) < options.dropout:
        return True
    return options.dropout_every_epochs > 0 and (epoch + 1) % options.dropout_every_epochs == 0


def _in_frame(text: str, options: CaptionOptions) -> str:
    return " ".join(part for part in (options.prefix, text, options.suffix) if part)


def _with_alternatives(text: str, choose: Callable[[Sequence[str]], str]) -> str:
    """`text` with one alternative of each `{a|b}`."""
    text = text.replace("{{", _OPEN).replace("}}", _CLOSE)
    text = _ALTERNATIVES.sub(lambda match: choose(match[1].split("|")), text)
    return text.replace(_OPEN, "{").replace(_CLOSE, "}")


def _with_tags_changed(
    text: str, options: CaptionOptions, generator: torch.Generator, step: int | None, steps: int | None
) -> str:
    fence = options.keep_tokens_separator
    fenced = bool(fence) and fence in text
    if not (fenced or options.shuffle or options.tag_dropout or options.warmup_steps):
        return text
    first, tags, last = list[str](), list[str](), list[str]()
    if fenced:
        parts = [_tags(part, options.separator) for part in text.split(fence, 2)]
        first, tags, last = (*parts, list[str]())[:3]
    else:
        tags = _tags(text, options.separator)
        first, tags = tags[: options.keep_tokens], tags[options.keep_tokens :]
    if step is not None and options.warmup_steps:
        tags = tags[: _warmed_up(len(tags), options, step, steps)]
    if options.shuffle:
        tags = [tags[place] for place in torch.randperm(len(tags), generator=generator).tolist()]
    if options.tag_dropout:
        tags = [tag for tag in tags if _random(generator) >= options.tag_dropout]
    return ", ".join([*first, *tags, *last])  # a comma, whatever the separator


def _tags(text: str, separator: str) -> list[str]:
    parts = text.split(separator) if separator else [text]
    return [tag for tag in map(str.strip, parts) if tag]


def _warmed_up(count: int, options: CaptionOptions, step: int, steps: int | None) -> int:
    """How many of `count` tags are used: from `warmup_min` at step 0, growing in proportion, to all of them."""
    end = options.warmup_steps
    if end < 1:  # a share of the run
        end = math.floor(end * (steps or 0))
    if step >= end:
        return count
    return math.floor(step * (count - options.warmup_min) / end) + options.warmup_min


def _random(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _choose(values: Sequence[str], generator: torch.Generator) -> str:
    return values[int(torch.randint(len(values), (), generator=generator))]

"""What is different in runs without pictures: sliders and the erasure of concepts, from prompts alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gouache.app.training.effects import changed
from gouache.errors import RequestError, printable
from gouache.nn.spec import UNetSpec
from gouache.training import concepts
from gouache.training.concepts import Concept, Size
from gouache.training.run_settings import RunSettings

_INLINE = ("target", "positive", "opposite", "erase", "neutrals", "guidance")  # settings that replace a file
_MOST_SHOWN = 16  # concepts in a file's metadata, as kohya's scripts write them


@dataclass(frozen=True)
class ConceptBatches:
    """The batches of a run without pictures: their numbers are all that the objective needs.

    An epoch is a turn of all `concepts`. `size` (width, height) is that of most of them.
    """

    concepts: Sequence[Concept]
    size: Size

    def __len__(self) -> int:
        return len(self.concepts)

    @property
    def sizes(self) -> Sequence[Size]:
        return [self.size]

    @property
    def resolution(self) -> Size:
        return self.size

    def __call__(self, number: int) -> None:
        return None


def check(settings: RunSettings) -> None:
    """Raises RequestError for settings that a slider lacks."""
    if settings.mode != "slider":
        return
    if settings.adapter.form == "none":
        raise RequestError("adapter.form", "is none: a slider is an adapter, whose strength varies; use lora")
    concepts_of(settings)


def check_model(settings: RunSettings, spec: UNetSpec) -> None:
    """Raises RequestError for a model whose network needs more than prompts."""
    if spec.in_channels != spec.out_channels:
        raise RequestError(
            "model.name",
            f"{printable(settings.model.name)} has {spec.in_channels} input channels, for a picture with a mask, "
            "which a slider does not have; use the base model",
        )


def concepts_of(settings: RunSettings) -> list[Concept]:
    """The concepts of the file, or of the settings. Raises FileError or RequestError."""
    chosen = settings.slider
    inline = [name for name in changed(chosen) if name in _INLINE]
    if chosen.file:
        if inline:
            raise RequestError(f"slider.{inline[0]}", "has no effect beside a file of prompts; write it there")
        found = concepts.read(Path(chosen.file))
    elif chosen.erase:
        if names := [name for name in inline if name in ("target", "positive", "opposite")]:
            raise RequestError(f"slider.{names[0]}", "is part of a slider, and erase is not; leave one of them out")
        neutrals = chosen.neutrals or [""]
        found = [Concept(chosen.erase, chosen.erase, neutral=each, guidance=chosen.guidance) for each in neutrals]
    elif chosen.positive or chosen.opposite:
        found = [
            each
            for neutral in chosen.neutrals or [chosen.target]
            for each in concepts.slider(
                chosen.target, chosen.positive, chosen.opposite, neutral=neutral, guidance=chosen.guidance
            )
        ]
    else:
        raise RequestError(
            "slider.file", "is missing; expected a file of prompts, or use --positive and --opposite, or --erase"
        )
    size = (chosen.size, chosen.size)
    return [replace(each, size=size) for each in found] if chosen.size else found


def size_of(found: Sequence[Concept], usual: Size) -> Size:
    """The size (width, height) of most concepts; `usual` is that of those that have none."""
    return Counter(each.size or usual for each in found).most_common(1)[0][0]


def largest(found: Sequence[Concept], usual: Size) -> Concept:
    """The concept whose batches have most pixels, always at its full size."""
    concept = max(found, key=lambda each: math.prod(each.size or usual) * (each.batch or 1))
    return replace(concept, dynamic=False)


def metadata(settings: RunSettings, found: Sequence[Concept]) -> dict[str, str]:
    """Facts of the run's prompts under the names of kohya's scripts; as much as `lineage` says."""
    described = {"ss_leco_prompt_count": str(len(found)), "gouache.data": concepts.identity(found)}
    if settings.lineage == "plain":
        shown = ("target", "positive", "unconditional", "neutral", "action", "multiplier", "weight")
        preview = [{name: getattr(each, name) for name in shown} for each in found[:_MOST_SHOWN]]
        described |= {
            "ss_sd_model_name": Path(settings.model.name).name,
            "ss_leco_preview": json.dumps(preview, ensure_ascii=False),
        }
        if settings.slider.file:
            described["ss_leco_prompts_file"] = Path(settings.slider.file).name
    return described

"""A1111's `parameters` text: what other programs and sites read out of a picture.

Prompt, then `Negative prompt: ...`, then one line of `Key: value` pairs. Values that hold a comma, colon or newline
stand in quotes, as JSON strings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from gouache.generate.request import Request


def write(
    request: Request, seed: int, size: tuple[int, int], sampler: str, schedule: str, more: Mapping[str, object]
) -> str:
    """`request` in A1111's words, for the picture of `seed`. `more` follows the usual fields: model, hash, version."""
    fields: dict[str, object] = {
        "Steps": request.steps,
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": _plain(request.cfg),
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
    }
    if request.init is not None:
        fields["Denoising strength"] = _plain(request.strength)
    if request.clip_skip is not None:
        fields["Clip skip"] = request.clip_skip
    if request.variation_seed is not None and request.variation_strength:
        fields["Variation seed"] = request.variation_seed
        fields["Variation seed strength"] = _plain(request.variation_strength)
    if request.eta is not None:
        fields["Eta"] = _plain(request.eta)
    if request.ensd:
        fields["ENSD"] = request.ensd
    if request.emphasis != "original":
        fields["Emphasis"] = {"no norm": "No norm", "ignore": "Ignore"}[request.emphasis]
    fields["RNG"] = request.rng.upper()
    fields.update(more)
    lines = [request.prompt]
    if request.negative:
        lines.append(f"Negative prompt: {request.negative}")
    lines.append(", ".join(f"{key}: {quote(value)}" for key, value in fields.items()))
    return "\n".join(lines)


def _plain(number: float) -> str:
    """All its digits, and no ".0"."""
    return repr(float(number)).removesuffix(".0")


def quote(value: object) -> str:
    """As it is, or as a JSON string where it holds what separates fields."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text

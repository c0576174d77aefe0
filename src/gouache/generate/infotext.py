"""A1111's `parameters` text, which other programs and sites read from a picture.

Prompt, then `Negative prompt: ...`, then one line of `Key: value` pairs. Values that contain a comma, colon or newline
are quoted as JSON strings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from gouache.generate.request import Request
from gouache.model.model import DEFAULT_CFG

UPSCALERS = {
    "latent": "Latent",
    "nearest-exact": "Latent (nearest-exact)",
    "bicubic": "Latent (bicubic)",
    "lanczos": "Lanczos",
}
EMPHASIS = {"none": "None", "ignore": "Ignore", "no norm": "No norm", "comfy": "Comfy"}


def write(
    request: Request,
    seed: int,
    sampler: str,
    schedule: str,
    more: Mapping[str, object],
    *,
    hires: tuple[str, str] | None = None,
    refiner: str | None = None,
) -> str:
    """`request`, with its size, for the picture of `seed`.

    `more` follows the usual fields: model, hash, version. `hires`: the sampler and schedule of the hires pass, if there
    was one; `refiner`: the model that took over, if one did, with its short hash.
    """
    assert request.size is not None
    fields: dict[str, object] = {
        "Steps": request.steps,
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": _number(DEFAULT_CFG if request.cfg is None else request.cfg),
        "Seed": seed,
        "Size": f"{request.size[0]}x{request.size[1]}",
    }
    if request.hires is not None:
        fields["Denoising strength"] = _number(request.hires_strength)
    elif request.init is not None:
        fields["Denoising strength"] = _number(request.strength)
    if request.clip_skip is not None:
        fields["Clip skip"] = request.clip_skip
    if request.variation_seed is not None and request.variation_strength:
        fields["Variation seed"] = request.variation_seed
        fields["Variation seed strength"] = _number(request.variation_strength)
    if request.hires is not None:
        if isinstance(request.hires, tuple):
            fields["Hires resize"] = f"{request.hires[0]}x{request.hires[1]}"
        else:
            fields["Hires upscale"] = _number(request.hires)
        if request.hires_steps is not None:
            fields["Hires steps"] = request.hires_steps
        fields["Hires upscaler"] = UPSCALERS[request.hires_upscaler]
        if hires is not None and hires[0] != sampler:
            fields["Hires sampler"] = hires[0]
        if hires is not None and hires[1] != schedule:
            fields["Hires schedule type"] = hires[1]
        if request.hires_prompt:
            fields["Hires prompt"] = request.hires_prompt
        if request.hires_negative:
            fields["Hires negative prompt"] = request.hires_negative
        if request.init is not None:
            fields["First pass denoising strength"] = _number(request.strength)
    if refiner is not None:
        fields["Refiner"] = refiner
        fields["Refiner switch at"] = _number(request.refiner_at)
    if request.eta is not None:
        fields["Eta"] = _number(request.eta)
    if request.ensd:
        fields["ENSD"] = request.ensd
    if request.emphasis != "original":
        fields["Emphasis"] = EMPHASIS[request.emphasis]
    fields["RNG"] = request.rng.upper()
    fields.update(more)
    lines = [request.prompt]
    if request.negative:
        lines.append(f"Negative prompt: {request.negative}")
    lines.append(", ".join(f"{key}: {quote(value)}" for key, value in fields.items()))
    return "\n".join(lines)


def _number(value: float) -> str:
    """All digits, without ".0"."""
    return repr(float(value)).removesuffix(".0")


def quote(value: object) -> str:
    """As it is, or as a JSON string if it contains what separates fields."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text

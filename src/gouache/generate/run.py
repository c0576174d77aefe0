"""A request and a model in, pictures out: the first straight line of the house, from the prompt to the PNG."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gouache.diffusion import guidance
from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.noise import Noise
from gouache.diffusion.samplers import catalog
from gouache.diffusion.samplers.sampler import Denoise, OnStep
from gouache.errors import RequestError
from gouache.generate import infotext
from gouache.generate.picture import Picture
from gouache.generate.request import Request
from gouache.generate.source import Source, read_source
from gouache.generate.splices import Paths, Shelf, Spliced, spliced
from gouache.images import pixels
from gouache.model.model import Model
from gouache.model.residency import dtype_name
from gouache.version import __version__

OnSpliced = Callable[[list[Spliced]], None]


@torch.inference_mode()
def paint(
    model: Model,
    request: Request,
    *,
    model_hash: str | None = None,
    shelf: Shelf | None = None,
    on_step: OnStep | None = None,
    on_spliced: OnSpliced | None = None,
) -> Iterator[Picture]:
    """Paint `request.count` pictures, each handed out as soon as it is done.

    `model_hash` (sha256, hex) goes into the recipes. `shelf` finds the files that the request names. `on_step` is told
    of each step of each batch, `on_spliced` of what was put into the model for this request, which is taken out when
    the iteration ends or is stopped. Stopping it loses nothing that was handed out.
    """
    with spliced(model, request.settled(), shelf or Paths()) as (bare, splices):
        if on_spliced is not None:
            on_spliced(splices)
        plan = _settle(model, bare)
        positive, negative = _prompts(model, plan)
        plan = replace(plan, request=replace(plan.request, prompt=request.prompt), splices=tuple(splices))
        for first in range(0, plan.request.count, plan.request.batch):
            seeds = _seeds(plan.request, first)
            latents = model.sampled(lambda: _sample(model, plan, positive, negative, seeds, on_step))  # noqa: B023
            images = pixels.to_pictures(model.decode(latents))
            for seed, image, latent in zip(seeds, images, latents):
                recipe, parameters = _describe(model, plan, seed, model_hash)
                yield Picture(image, latent.float().cpu(), seed, recipe, parameters)


@dataclass(frozen=True)
class _Plan:
    """A request with its blanks filled: `sigmas` is the whole run, of which `source` may leave only the end."""

    request: Request
    size: tuple[int, int]
    sampler: catalog.SamplerInfo
    schedule: str
    sigmas: Tensor
    source: Source
    splices: tuple[Spliced, ...] = ()


def _settle(model: Model, request: Request) -> _Plan:
    sampler, schedule = catalog.find(request.sampler, request.schedule)
    source = read_source(model, request)
    sigmas = catalog.plan(sampler, schedule, model.schedule, request.steps)
    if source.latent is not None and request.strength < 1:
        kept = min(int(request.steps * request.strength), request.steps)
        if not kept:
            raise RequestError("strength", f"{request.strength:g} of {request.steps} steps is no step; raise either")
        sigmas = sigmas[len(sigmas) - 1 - kept :]
    if request.eta is not None and "eta" not in sampler.knobs:
        raise RequestError("eta", f"{sampler.name} adds no noise; DDIM and the ancestral samplers do")
    return _Plan(replace(request, size=source.size), source.size, sampler, schedule, sigmas, source)


def _prompts(model: Model, plan: _Plan) -> tuple[Conditioning, Conditioning]:
    """Conditioning of one row each, of equal length: the shorter prompt is filled up with the empty one's chunks."""
    request = plan.request

    def said(text: str, negative: bool) -> Conditioning:
        return model.encode_prompts(
            [text], negative=negative, clip_skip=request.clip_skip, size=plan.size, emphasis=request.emphasis
        )

    positive, negative = said(request.prompt, False), said(request.negative, True)
    chunks = max(positive.tokens, negative.tokens) // 77
    if positive.tokens < negative.tokens:
        positive = positive.pad_to(chunks, said("", False).context)
    elif negative.tokens < positive.tokens:
        # With nothing said at all, a family may put zeros in place of words; they fill up only such a prompt.
        negative = negative.pad_to(chunks, said("", not request.negative.strip()).context)
    if plan.source.concat is not None:
        positive, negative = (replace(each, concat=plan.source.concat) for each in (positive, negative))
    return positive, negative


def _sample(
    model: Model,
    plan: _Plan,
    positive: Conditioning,
    negative: Conditioning,
    seeds: list[int],
    on_step: OnStep | None,
) -> Tensor:
    """The latents (B, C, h, w) of these seeds."""
    request, sigmas = plan.request, plan.sigmas
    noise = Noise(
        seeds,
        plan.source.shape,
        generator=request.rng,
        device=model.device,
        variation_seeds=_variation_seeds(request, seeds),
        variation_strength=request.variation_strength,
        ensd=request.ensd,
    )
    if plan.source.latent is not None and request.strength < 1:
        x = plan.source.latent + sigmas[0] * noise.start()
    else:
        x = catalog.start(plan.sampler, noise.start(), sigmas)
    denoise = _guided(model, plan, positive.repeat(len(seeds)), negative.repeat(len(seeds)))
    knobs: dict[str, Any] = {} if request.eta is None else {"eta": request.eta}
    x = catalog.finish(plan.sampler.function(denoise, x, sigmas, noise=noise, on_step=on_step, **knobs), sigmas)
    if plan.source.mask is not None and plan.source.latent is not None:
        # A run that stops above level 0 leaves a little noise, which what the mask keeps must not have.
        x = torch.lerp(plan.source.latent, x, plan.source.mask)
    return x


def _guided(model: Model, plan: _Plan, positive: Conditioning, negative: Conditioning) -> Denoise:
    request, source = plan.request, plan.source
    if model.variant == "instruct-pix2pix":
        denoise = guidance.instruct(model.denoise, positive, negative, request.cfg, request.image_cfg)
    else:
        denoise = guidance.cfg(
            model.denoise, positive, negative, request.cfg, rescale=request.rescale, prediction=model.prediction
        )
    if source.mask is not None and source.latent is not None:
        denoise = guidance.masked(denoise, source.mask, source.latent)
    if any(not layer.strength.whole_run for layer in model.layers):
        denoise = guidance.at_progress(denoise, plan.sigmas, model.layers.at)
    return denoise


def _seeds(request: Request, first: int) -> list[int]:
    assert request.seed is not None  # settled
    count = min(request.batch, request.count - first)
    return [(request.seed + first + index) % 2**64 for index in range(count)]


def _variation_seeds(request: Request, seeds: list[int]) -> list[int] | None:
    """With A1111, the variation seed counts up with the picture, as the seed does."""
    if request.variation_seed is None or request.seed is None:
        return None
    return [(request.variation_seed + seed - request.seed) % 2**64 for seed in seeds]


def _describe(model: Model, plan: _Plan, seed: int, model_hash: str | None) -> tuple[dict[str, Any], str]:
    """The recipe of one picture, and the same as A1111 says it."""
    request = replace(plan.request, seed=seed, count=1, batch=1)
    if request.variation_seed is not None and plan.request.seed is not None:
        request = replace(request, variation_seed=(request.variation_seed + seed - plan.request.seed) % 2**64)
    told = {**request.to_json(), "sampler": plan.sampler.name, "schedule": plan.schedule}
    recipe: dict[str, Any] = {
        "request": told,
        "batch": plan.request.batch,
        "model": {
            "name": model.file.path.stem,
            "path": str(model.file.path),
            "sha256": model_hash,
            "family": model.family.name,
            "variant": model.variant,
            "prediction": model.prediction,
        },
        "splices": [each.to_json() for each in plan.splices],
        "inputs": dict(plan.source.hashes),
        "device": model.device.type,
        "dtype": dtype_name(model.dtype),
        "upcast": list(model.upcast),
        "versions": {"gouache": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    more = {"Model hash": model_hash[:10]} if model_hash else {}
    more |= {"Model": model.file.path.stem, **_hashes(plan.splices), "Version": f"Gouache {__version__}"}
    return recipe, infotext.write(request, seed, plan.size, plan.sampler.name, plan.schedule, more)


def _hashes(splices: tuple[Spliced, ...]) -> dict[str, object]:
    """As sites read them, to link a picture with what it was made by."""
    told: dict[str, object] = {}
    for kind, key in (("lora", "Lora hashes"), ("embedding", "TI hashes"), ("hypernetwork", "Hypernet hashes")):
        if names := [f"{each.path.stem}: {each.sha256[:12]}" for each in splices if each.kind == kind]:
            told[key] = ", ".join(names)
    for each in splices:
        if each.kind == "vae":
            told |= {"VAE hash": each.sha256[:10], "VAE": each.path.name}
    return told

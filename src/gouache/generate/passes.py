"""Passes: a request as one or more sampling runs with everything settled.

The first pass starts from noise or from a picture. Hires fix is a second pass from the enlarged result. A refiner is
the end of the last pass on another model, from the noisy latent that the first model left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gouache.diffusion.noise import Noise
from gouache.diffusion.samplers import catalog
from gouache.errors import ModelError, RequestError, printable
from gouache.generate.memory import check_memory
from gouache.generate.prompting import Guides, Prompts, encode_prompts, read_prompts
from gouache.generate.request import Request, Size
from gouache.generate.source import Source, check_size, pass_size, read_source
from gouache.images import pixels
from gouache.images.upscale import LATENT_MODES, upscale_latent, upscale_picture
from gouache.model.lease import Lease
from gouache.model.model import Model

MAX_LEVELS = 10_000  # noise levels that are spaced for a hires pass, of which it runs the last

Initial = Callable[[Tensor | None, Noise], Tensor]
"""(the previous pass's result, this pass's noise) -> x at the first sigma, (B, C, h, w)."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One sampling run on `model`, under `lease`.

    `sigmas` are those it visits. `guides` are the conditionings by step, counted from `first_step`; `steps` is the
    length of the run that it is a part of. `initial` makes its x. A run that changes its model on the way is two
    passes: the first has `ends` False, and the second `continues` with its x and its noise generators.
    """

    model: Model
    lease: Lease
    sampler: catalog.SamplerInfo
    schedule: str
    sigmas: Tensor
    source: Source
    guides: Callable[[int], Guides]
    initial: Initial
    steps: int
    first_step: int = 1
    ends: bool = True
    continues: bool = False

    @property
    def count(self) -> int:
        """How many steps it takes."""
        return len(self.sigmas) - 1


@dataclass(frozen=True)
class Guided:
    """A prompt, as one pass uses it."""

    prompt: str
    negative: str
    lease: Lease


def plan_passes(
    model: Model, request: Request, first: Guided, second: Guided, refiner: Callable[[], Model] | None
) -> list[Pass]:
    """The passes of `request`. `second` is for the hires pass, `refiner` loads the model that takes over.

    Prompts are encoded and pictures read here. Raises RequestError for settings that do not go together.
    """
    size = pass_size(model, request)
    larger = request.hires_size(size) if request.hires is not None else None
    if larger is not None:
        check_size(model, larger)
    check_memory(model, larger or size, min(request.batch, request.count))
    passes = [_first(model, request, size, first)]
    prompts = read_prompts(first.prompt, first.negative, request.steps)
    if larger is not None:
        steps = request.hires_steps or request.steps
        passes.append(_hires(model, request, larger, second))
        prompts = read_prompts(second.prompt, second.negative, steps, base_steps=request.steps)
    if refiner is not None and request.refiner_at < 1:
        passes[-1:] = _refined(passes[-1], request, prompts, refiner)
    return passes


def _first(model: Model, request: Request, size: Size, guided: Guided) -> Pass:
    sampler, schedule = catalog.find(request.sampler, request.schedule)
    if request.eta is not None and "eta" not in sampler.knobs:
        raise RequestError("eta", f"{sampler.name} has no eta; DDIM and the ancestral samplers have")
    with guided.lease:
        source = read_source(model, request, size)
        sigmas = catalog.plan(sampler, schedule, model.schedule, request.steps)
        latent = source.latent
        if latent is not None and request.strength < 1:
            kept = math.floor(request.steps * request.strength + 1e-9)  # 50 x 0.58 is 29
            if not kept:
                raise RequestError(
                    "strength",
                    f"{request.strength:g} leaves no steps to run (0 of {request.steps}); raise strength or steps",
                )
            sigmas = sigmas[len(sigmas) - 1 - kept :]
        prompts = read_prompts(guided.prompt, guided.negative, request.steps)
        guides = _guides(model, request, prompts, source)

    def initial(previous: Tensor | None, noise: Noise) -> Tensor:
        if latent is not None and request.strength < 1:
            return latent + sigmas[0] * noise.start()
        return catalog.start(sampler, noise.start(), sigmas)

    return Pass(model, guided.lease, sampler, schedule, sigmas, source, guides, initial, len(sigmas) - 1)


def _hires(model: Model, request: Request, size: Size, guided: Guided) -> Pass:
    """A1111's hires fix: exactly `hires_steps` steps, the end of as many more as the strength leaves out."""
    sampler, schedule = catalog.find(
        request.hires_sampler or request.sampler, request.hires_schedule or request.schedule
    )
    steps = request.hires_steps or request.steps
    if steps > MAX_LEVELS * request.hires_strength:
        raise RequestError(
            "hires_strength",
            f"{request.hires_strength:g} is too small for {steps} steps; raise it, or leave hires out",
        )
    with guided.lease:
        source = read_source(model, request, size)
        total = int(steps / min(request.hires_strength, 0.999))
        sigmas = catalog.plan(sampler, schedule, model.schedule, total)[-steps - 1 :]
        prompts = read_prompts(guided.prompt, guided.negative, steps, base_steps=request.steps)
        guides = _guides(model, request, prompts, source)

    def initial(previous: Tensor | None, noise: Noise) -> Tensor:
        assert previous is not None
        return enlarged(model, previous, source, request.hires_upscaler) + sigmas[0] * noise.start()

    return Pass(model, guided.lease, sampler, schedule, sigmas, source, guides, initial, steps)


def enlarged(model: Model, latents: Tensor, source: Source, upscaler: str) -> Tensor:
    """latents (B, C, h, w) at the size of `source`: interpolated, or decoded, enlarged and encoded again."""
    if upscaler in LATENT_MODES:
        return upscale_latent(latents, (source.shape[2], source.shape[1]), upscaler)
    pictures = [upscale_picture(picture, source.size) for picture in pixels.to_pictures(model.decode(latents))]
    return torch.cat([model.encode(pixels.to_tensor([picture])) for picture in pictures])


def _refined(whole: Pass, request: Request, prompts: Prompts, load: Callable[[], Model]) -> list[Pass]:
    """`whole`, the end of which the refiner runs: from the first step at which `refiner_at` of the levels are done."""
    levels = len(whole.model.schedule.sigmas)
    timesteps = whole.model.schedule.t(whole.sigmas[:-1], quantize=True).tolist()
    done = [(levels - 1 - timestep) / levels for timestep in timesteps]
    switch = next((index for index, share in enumerate(done) if share >= request.refiner_at), None)
    if switch is None:
        return [whole]
    with torch.inference_mode(False):
        refiner = load()
    if refiner.vae.spec.latent_channels != whole.source.shape[0] or refiner.latent_scale != whole.model.latent_scale:
        raise ModelError(
            f"{printable(str(refiner.file.path))} cannot refine: its latents are those of {refiner.family.title}, the "
            f"model's are those of {whole.model.family.title}"
        )
    lease = refiner.exclusive()
    with lease:
        source = replace(whole.source, concat=None)
        if refiner.variant != "base":
            raise ModelError(
                f"{printable(str(refiner.file.path))} cannot refine: it is a {refiner.variant} model, expected base"
            )
        guides = _guides(refiner, request, prompts, source)
    end = replace(
        whole, model=refiner, lease=lease, sigmas=whole.sigmas[switch:], source=source, guides=guides,
        first_step=switch + 1,
    )  # fmt: skip
    if switch == 0:
        return [end]

    def initial(previous: Tensor | None, noise: Noise) -> Tensor:
        assert previous is not None
        return previous

    return [
        replace(whole, sigmas=whole.sigmas[: switch + 1], ends=False),
        replace(end, initial=initial, continues=True),
    ]


def _guides(model: Model, request: Request, prompts: Prompts, source: Source) -> Callable[[int], Guides]:
    if model.variant == "instruct-pix2pix" and [weight for weight, _ in prompts.positive] != [1]:
        raise RequestError("prompt", "AND and weights of whole prompts do not work with an instruct-pix2pix model")
    return encode_prompts(
        model,
        prompts,
        size=source.size,
        clip_skip=request.clip_skip,
        emphasis=request.emphasis,
        concat=source.concat,
    )

"""A request and a model in, pictures out: the main pipeline, from the prompt to the PNG."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gouache.diffusion import guidance
from gouache.diffusion.noise import Noise
from gouache.diffusion.samplers import catalog
from gouache.diffusion.samplers.sampler import Denoise, OnStep, Step
from gouache.errors import RequestError
from gouache.generate import infotext
from gouache.generate.adapters import FileSource, PathSource, UsedFile, find_adapters, find_vae, used_files
from gouache.generate.passes import Guided, Pass, plan_passes
from gouache.generate.picture import Picture
from gouache.generate.prompting import Guides, split_prompt
from gouache.generate.request import IMAGES, Request
from gouache.images import pixels
from gouache.model.lease import Lease
from gouache.model.model import Model
from gouache.model.residency import dtype_name
from gouache.prompts.tags import strip_comments
from gouache.version import __version__

OnAttached = Callable[[list[UsedFile]], None]
LoadModel = Callable[[str], Model]
HashOf = Callable[[Model], str | None]


@torch.inference_mode()
def paint(
    model: Model,
    request: Request,
    *,
    hash_of: HashOf = lambda model: None,
    source: FileSource | None = None,
    load: LoadModel | None = None,
    on_step: OnStep | None = None,
    on_attached: OnAttached | None = None,
) -> Iterator[Picture]:
    """Generate `request.count` pictures, each yielded as soon as its batch is done.

    `hash_of` returns a model's sha256 (hex) for the recipes; it is called after the first batch. `source` finds the
    files that the request names, `load` the refiner. `on_step` is called after each step, counted over all passes
    of a batch, `on_attached` with the files this request attaches. These are detached when the iteration ends, is
    closed, or another request uses the model; between batches other threads may use it. Closing the iteration loses
    no picture that was yielded.
    """
    request = request.settled()
    with ExitStack() as stack:
        job = _prepare(model, request, source or PathSource(), load, stack)
        if on_attached is not None:
            on_attached(job.used)
        for first in range(0, request.count, request.batch):
            seeds = _seeds(request, first)
            latents = _sample(job, seeds, on_step)
            with next((each.lease for each in reversed(job.passes) if each.model is model), job.lease):
                images = pixels.to_pictures(model.decode(latents))
                upcast = list(model.upcast)
            for index, (seed, image, latent) in enumerate(zip(seeds, images, latents)):
                recipe, parameters = _describe(job, seed, (len(seeds), index), upcast, hash_of)
                with torch.inference_mode(False):  # a picture's latent can be trained on
                    latent = latent.clone().float().cpu()
                yield Picture(image, latent, seed, recipe, parameters)


@dataclass(frozen=True)
class _Job:
    """A request with everything found, read and encoded that its batches share."""

    model: Model
    request: Request
    lease: Lease
    passes: Sequence[Pass]
    used: list[UsedFile]


def _prepare(model: Model, request: Request, source: FileSource, load: LoadModel | None, stack: ExitStack) -> _Job:
    prompt, tags = split_prompt(request.prompt)
    hires_prompt, hires_tags = split_prompt(request.hires_prompt)
    negative, hires_negative = strip_comments(request.negative), strip_comments(request.hires_negative)
    if request.refiner is not None and load is None:
        raise RequestError("refiner", "cannot be loaded here; use gouache.load(...).paint")

    with model.exclusive():  # what another request has attached is not the model's
        vae = find_vae(model, request.vae, source)
        adapters = find_adapters(model, request, tags, source)
    lease = Lease(model, [each.use for each in adapters], vae)
    stack.callback(lease.close)
    with lease:
        used = used_files(model, adapters, lease.attached, request, source)
    first = Guided(prompt, negative, lease)
    second = replace(first, negative=hires_negative or negative)
    if request.hires is not None and request.hires_prompt:
        # A hires prompt has tags of its own, which replace those of the prompt.
        with model.exclusive():
            adapters = find_adapters(model, request, hires_tags, source)
        hires_lease = Lease(model, [each.use for each in adapters], vae)
        stack.callback(hires_lease.close)
        with hires_lease:
            more = used_files(model, adapters, hires_lease.attached, request, source)
        known = {(each.path, each.setting) for each in used}
        used += [each for each in more if (each.path, each.setting) not in known]
        second = replace(second, prompt=hires_prompt, lease=hires_lease)

    name = request.refiner
    refiner = (lambda: load(name)) if name is not None and load is not None else None
    passes = plan_passes(model, request, first, second, refiner)
    settled = replace(request, size=passes[0].source.size, cfg=model.cfg if request.cfg is None else request.cfg)
    return _Job(model, settled, lease, passes, used)


def _sample(job: _Job, seeds: list[int], on_step: OnStep | None) -> Tensor:
    """The latents (B, C, h, w) of these seeds, through all passes."""
    request = job.request
    total = sum(each.count for each in job.passes)
    done = 0
    result: Tensor | None = None
    noise: Noise | None = None
    for each in job.passes:
        if noise is None or not each.continues:
            noise = Noise(
                seeds,
                each.source.shape,
                generator=request.rng,
                device=each.model.device,
                variation_seeds=_variation_seeds(request, seeds),
                variation_strength=request.variation_strength,
                ensd=request.ensd,
            )
        start, previous, before = noise, result, done

        def report(step: Step, before: int = before) -> None:
            if on_step is not None:
                on_step(replace(step, index=before + step.index, count=total))

        def run(each: Pass = each, start: Noise = start, previous: Tensor | None = previous) -> Tensor:
            nonlocal noise
            noise = start.fork()  # a run that is repeated in float32 draws the same noise
            return run_pass(each, request, previous, noise, len(seeds), report)

        with each.lease:
            result = each.model.sampled(run)
        done += each.count
    assert result is not None
    return result


def run_pass(
    each: Pass, request: Request, previous: Tensor | None, noise: Noise, batch: int, on_step: OnStep | None
) -> Tensor:
    """The result (B, C, h, w) of one pass: a latent, or, if a pass continues it, x at its last sigma."""
    x = each.initial(previous, noise)
    denoise, on_step = guidance.by_step(_denoisers(each, request, batch), on_step, each.first_step)
    knobs: dict[str, Any] = {}
    if request.eta is not None and "eta" in each.sampler.knobs:
        knobs["eta"] = request.eta
    x = each.sampler.function(denoise, x, each.sigmas, noise=noise, on_step=on_step, **knobs)
    if not each.ends:
        return x
    x = catalog.finish(x, each.sigmas)
    if each.source.mask is not None and each.source.latent is not None:
        # A run that stops above level 0 leaves a little noise, which what the mask keeps must not have.
        x = torch.lerp(each.source.latent, x, each.source.mask)
    return x


def _denoisers(each: Pass, request: Request, batch: int) -> Callable[[int], Denoise]:
    """The guided denoiser of each step; made again only where the conditionings change."""
    last: tuple[Guides, Denoise] | None = None

    def make(step: int) -> Denoise:
        nonlocal last
        if each.model.adapters.changes_by_step:
            each.model.adapters.set_progress((step - 1) / each.steps)
        guides = each.guides(step)
        if last is None or last[0] is not guides:
            last = guides, _guided(each, request, guides, batch)
        return last[1]

    return make


def _guided(each: Pass, request: Request, guides: Guides, batch: int) -> Denoise:
    model, source = each.model, each.source
    assert request.cfg is not None  # settled
    positive = [replace(term, conditioning=term.conditioning.repeat(batch)) for term in guides.positive]
    negative = guides.negative.repeat(batch)
    if model.variant == "instruct-pix2pix":
        denoise = guidance.instruct(model.denoise, positive[0].conditioning, negative, request.cfg, request.image_cfg)
    else:
        denoise = guidance.cfg(
            model.denoise, positive, negative, request.cfg, rescale=request.rescale, prediction=model.prediction
        )
    if source.mask is not None and source.latent is not None:
        denoise = guidance.masked(denoise, source.mask, source.latent)
    return denoise


def _seeds(request: Request, first: int) -> list[int]:
    assert request.seed is not None  # settled
    count = min(request.batch, request.count - first)
    return [(request.seed + first + index) % 2**64 for index in range(count)]


def _variation_seeds(request: Request, seeds: list[int]) -> list[int] | None:
    """As in A1111, the variation seed counts up with the picture like the seed."""
    if request.variation_seed is None or request.seed is None:
        return None
    return [(request.variation_seed + seed - request.seed) % 2**64 for seed in seeds]


def _describe(
    job: _Job, seed: int, batch: tuple[int, int], upcast: list[str], hash_of: HashOf
) -> tuple[dict[str, Any], str]:
    """The recipe of one picture, and the same in A1111's format. `batch`: the size of its batch, its index there."""
    model, whole, first = job.model, job.request, job.passes[0]
    request = replace(whole, seed=seed, count=1, batch=1)
    if request.variation_seed is not None and whole.seed is not None:
        request = replace(request, variation_seed=(request.variation_seed + seed - whole.seed) % 2**64)
    settings = {**request.to_json(), "sampler": first.sampler.name, "schedule": first.schedule}
    model_hash = hash_of(model)
    hires = next((each for each in job.passes[1:] if not each.continues), None)
    if hires is not None:
        settings |= {"hires_sampler": hires.sampler.name, "hires_schedule": hires.schedule}
    images = {name: image.sha256 for name in IMAGES if (image := getattr(request, name)) is not None}
    recipe: dict[str, Any] = {
        "request": settings,
        "batch": whole.batch,
        "model": _model(model, model_hash),
        "adapters": [each.to_json() for each in job.used],
        "inputs": images,
        "device": model.device.type,
        "dtype": dtype_name(model.dtype),
        "upcast": upcast,
        "versions": {"gouache": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    if whole.batch > 1:  # the last batch of a series may be smaller
        recipe |= {"batch_size": batch[0], "batch_index": batch[1]}
    more: dict[str, object] = {"Model hash": model_hash[:10]} if model_hash else {}
    more |= {"Model": model.file.path.stem, **_hashes(job.used), "Version": f"Gouache {__version__}"}
    refiner = next((each.model for each in job.passes if each.model is not model), None)
    if refiner is not None:
        recipe["refiner"] = _model(refiner, hash_of(refiner))
    return recipe, infotext.write(
        request,
        seed,
        first.sampler.name,
        first.schedule,
        more,
        hires=(hires.sampler.name, hires.schedule) if hires is not None else None,
        refiner=_title(refiner, hash_of) if refiner is not None else None,
    )


def _title(model: Model, hash_of: HashOf) -> str:
    """A1111's short title: "name [0123456789]"."""
    sha256 = hash_of(model)
    return f"{model.file.path.stem} [{sha256[:10]}]" if sha256 else model.file.path.stem


def _model(model: Model, sha256: str | None) -> dict[str, Any]:
    return {
        "name": model.file.path.stem,
        "path": os.path.abspath(model.file.path),  # noqa: PTH100  # links are kept
        "sha256": sha256,
        "family": model.family.name,
        "variant": model.variant,
        "prediction": model.prediction,
    }


def _hashes(used: Sequence[UsedFile]) -> dict[str, object]:
    """As sites read them, to link a picture with the files it was made with."""
    found: dict[str, object] = {}
    for kind, key in (("lora", "Lora hashes"), ("embedding", "TI hashes"), ("hypernetwork", "Hypernet hashes")):
        if names := [f"{each.path.stem}: {each.sha256[:12]}" for each in used if each.kind == kind]:
            found[key] = ", ".join(names)
    for each in used:
        if each.kind == "vae":
            found |= {"VAE hash": each.sha256[:10], "VAE": each.path.name}
    return found

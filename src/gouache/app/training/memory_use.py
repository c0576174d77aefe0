"""The memory that a run needs, phase by phase, before a weight is read: networks whose tensors have no data."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from gouache.app.model import Model
from gouache.app.settings import Settings
from gouache.app.training import prepare, pretraining, sliders
from gouache.app.training.objective import make_concept_objective, make_objective
from gouache.app.training.sliders import ConceptBatches
from gouache.data.buckets import Size
from gouache.diffusion.conditioning import Conditioning
from gouache.errors import FileError
from gouache.families.identify import identify
from gouache.files.source import TORCH_NAMES
from gouache.model import residency
from gouache.nn.vae import Autoencoder
from gouache.outside import open_outside
from gouache.prompts.encode import Sizes
from gouache.training import checkpointing, snapshot
from gouache.training.batch import Batch
from gouache.training.batches import Batches
from gouache.training.concept_objective import Draws
from gouache.training.memory import Simulation
from gouache.training.run_settings import RunSettings
from gouache.training.step import accumulate_gradients, clip_gradients, update
from gouache.training.target import Target


@dataclass(frozen=True)
class MemoryUse:
    """Bytes. `peak` is the memory that the run takes for itself on its device; `mapped` are weights that it reads from
    the model's file at every step, which the system can drop and read again. `checkpoint` is the size of one on disk,
    `trained` that of the trained weights.
    """

    peak: int
    mapped: int
    checkpoint: int
    trained: int


# The GNU C library keeps freed blocks of less than 32 MB, and what it cannot fill again is lost. Of a U-Net's step at
# 256 px, tensors take 387 MB in float32 and 285 MB in bf16. Measured were 389 and 281 MB where every block was returned
# at once (MALLOC_MMAP_THRESHOLD_=65536), 590 and 430 MB as usual; of samples after some steps 1.6 to 2.3 times. With
# autocast the copies of weights, which are made once per step and are large, lose nothing. With the limits that a run
# sets (`memory.limit_heap`) the factors still hold within some 10 %, see `benchmarks.dry_run`.
_HEAP, _HEAP_OF_SAMPLES = 1.5, 1.8
# Encoding a picture in bf16 on a processor without units for it: 368 MB where tensors take 81; in float32 239 of 161.
_HEAP_OF_HALF_VAE = 4.5
# In the header of a safetensors file, with shape and offsets: 146 in a checkpoint of a LoRA.
_BYTES_OF_NAME = 146
# What oneDNN's kernels and their caches keep, measured as the growth of a process over its first steps.
_KERNELS = 30_000_000


def memory_use(
    settings: RunSettings, model: Model, device: torch.device, batches: Batches | ConceptBatches, user: Settings
) -> MemoryUse:
    """That of the run with `settings` on `device`. `model` is on the meta device, and not to be used afterwards.

    The batches are used for their sizes alone.
    """
    simulated = Simulation(device)
    networks = {"unet": model.unet, "vae": model.vae, **model.text_encoders}
    if isinstance(model.vae, Autoencoder):
        model.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as `Core` does at first use
    simulated.convert(*networks.values())
    model.core.device = device
    with simulated.only():
        target = prepare.make_target(settings, model, user)
    simulated.fill_buffers(*target.networks.values())
    private = _private_bytes(model, target, device)
    for network in (model.unet, *model.text_encoders.values()) if settings.memory.checkpointing else ():
        checkpointing.enable(network)
    if isinstance(batches, ConceptBatches):
        settings = _fewest_steps(settings)
        concept = sliders.largest(batches.concepts, model.size)
        objective = make_concept_objective(settings, model, target, [concept], user)
        size = concept.size or model.size
        latents = _latents(simulated, model, size, concept.batch or settings.train.batch)
        batch = Draws(concept, 1, Sizes(size), latents)
    elif pretraining.trains_on_pictures(settings):
        size, count = _largest(batches, settings.train.batch)
        objective = pretraining.make_objective(settings, model, batches, user)
        simulated.convert(*(each for name, each in objective.networks.items() if name not in networks))
        batch = Batch(simulated.empty(count, 3, size[1], size[0]), captions=("a",) * count)
    else:
        objective = make_objective(settings, model, target, batches, user, settings.data.caption_dropout)
        size, count = _largest(batches, settings.train.batch)
        batch = _batch(simulated, model, target, size, count, settings.data.trigger or "a")
    train = settings.train.model_copy(update={"accumulate": min(2, settings.train.accumulate)})
    run: snapshot.Run | None = None

    def begin() -> object:
        nonlocal run
        run = snapshot.begin(objective, train)
        return run

    def gradients() -> object:
        assert run is not None
        accumulate_gradients(run, lambda number: batch, 0)
        return run

    def updated() -> object:
        assert run is not None
        clip_gradients(run)
        update(run, 0)
        return run

    _, copies = simulated.measure(begin)
    backward, grads = simulated.measure(gradients)
    updating, moments = simulated.measure(updated)  # they exist from the first update on
    assert run is not None
    names = len(run.parameters) * (2 if run.ema else 1) + sum(map(len, run.optimizer.state.values()))
    checkpoint, kept = snapshot.estimated_bytes(run) + _BYTES_OF_NAME * names, copies + moments
    step = max(kept + backward, copies + grads + updating)
    encode, _ = simulated.measure(lambda: _encode(simulated, model, size))
    sample, _ = simulated.measure(lambda: _sample(simulated, model, size))
    trained = sum(each.nbytes for group in target.groups() for each in group.parameters.values())
    heap, heap_of_samples, heap_of_encoder, scratch, own = 1.0, 1.0, 1.0, 0, 0
    if device.type == "cpu":
        heap, heap_of_samples, own = _HEAP, _HEAP_OF_SAMPLES, _own_memory() + _KERNELS
        heap_of_encoder = heap if model.dtype == torch.float32 else _HEAP_OF_HALF_VAE
        scratch = max(each.nbytes for each in model.unet.parameters())
    encoders = private["vae"] + sum(private[name] for name in model.text_encoders)
    networks_always = private["unet"] + private.get("adapter", 0)
    if not settings.data.cache:
        networks_always, encoders = networks_always + encoders, 0
    elif target.trains_text:
        networks_always, encoders = networks_always + encoders - private["vae"], private["vae"]
    lasting = kept + grads
    cast = sum(each.nbytes // 2 for each in model.unet.parameters()) if objective.autocast else 0
    cast = min(cast, step - lasting)
    averaged = trained if settings.train.ema_decay else 0  # the last weights, while the averages are painted with
    peak = max(
        lasting + cast + heap * (step - lasting - cast) + scratch,
        encoders + heap_of_encoder * encode,
        encoders + kept + averaged + heap_of_samples * sample + scratch,
    )
    mapped = sum(each.nbytes for each in model.unet.parameters()) - private["unet"]
    return MemoryUse(round(own + networks_always + peak), mapped, checkpoint, trained)


def _fewest_steps(settings: RunSettings) -> RunSettings:
    """The settings with as few denoising steps as possible: each takes the same memory."""
    return settings.model_copy(update={"slider": settings.slider.model_copy(update={"denoising_steps": 2})})


def _private_bytes(model: Model, target: Target, device: torch.device) -> dict[str, int]:
    """The bytes of the weights of each network that are not pages of a file."""
    vae_found = model.found if model.vae_file is None else identify(model.vae_file)
    found = {"vae": vae_found} | dict.fromkeys(("unet", *model.text_encoders), model.found)
    networks = {"unet": model.unet, "vae": model.vae, **model.text_encoders}
    result: dict[str, int] = {}
    for name, network in networks.items():
        part = found[name].components.get(name)
        in_file = part is not None and TORCH_NAMES[part.dtype.value] == str(model.dtype).removeprefix("torch.")
        mapped = device.type == "cpu" and in_file
        trained = target.networks.get(name) is not None
        result[name] = sum(
            each.nbytes
            for each in network.parameters()
            # some convolutions are copied to another memory format
            if not mapped or trained or (each.ndim == 4 and not each.is_contiguous())
        )
    if target.keeps_weights:
        result["adapter"] = sum(each.nbytes for network in target.networks.values() for each in network.parameters())
    return result


def _largest(batches: Batches, batch: int) -> tuple[Size, int]:
    """The size and the number of pictures of the batch with most pixels; a small bucket does not fill one."""
    counts = Counter[Size]()
    for size, repeats in zip(batches.columns.sizes, batches.columns.repeats):
        counts[size] += repeats
    return max(
        ((size, min(batch, count)) for size, count in counts.items()), key=lambda each: math.prod(each[0]) * each[1]
    )


def _batch(simulated: Simulation, model: Model, target: Target, size: Size, count: int, caption: str) -> Batch:
    spec, latents = model.unet.spec, _latents(simulated, model, size, count)
    concat = None
    if spec.in_channels > spec.out_channels:
        concat = simulated.empty(count, spec.in_channels - spec.out_channels, *latents.shape[2:])
    if target.trains_text:
        return Batch(latents, captions=(caption,) * count, sizes=(Sizes(size),) * count, concat=concat)
    return Batch(latents, Conditioning(*_conditioning(simulated, model, count), concat=concat))


def _latents(simulated: Simulation, model: Model, size: Size, count: int) -> Tensor:
    factor = model.vae.spec.factor
    return simulated.empty(count, model.unet.spec.out_channels, size[1] // factor, size[0] // factor)


def _conditioning(simulated: Simulation, model: Model, count: int) -> tuple[Tensor, Tensor | None]:
    spec = model.unet.spec
    vector = simulated.empty(count, spec.vector_channels) if spec.vector_channels else None
    return simulated.empty(count, 77, spec.context_dim), vector


@torch.no_grad()
def _encode(simulated: Simulation, model: Model, size: Size) -> object:
    return model.core.encode(simulated.empty(1, 3, size[1], size[0]))


@torch.no_grad()
def _sample(simulated: Simulation, model: Model, size: Size) -> object:
    """One evaluation with guidance, and the picture."""
    spec, factor = model.unet.spec, model.vae.spec.factor
    latents = simulated.empty(2, spec.in_channels, size[1] // factor, size[0] // factor)
    context, vector = _conditioning(simulated, model, 2)
    dtype = next(model.unet.parameters()).dtype
    model.unet(latents.to(dtype), torch.ones(2), context.to(dtype), *([] if vector is None else [vector.to(dtype)]))
    return model.core.decode(simulated.empty(1, model.vae.spec.latent_channels, *latents.shape[2:]))


def available(device: torch.device) -> int:
    """The bytes of memory that a run can have on `device` now, with what this process has already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        with open_outside("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file.read().decode().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024 + _own_memory()
    except (FileError, KeyError, ValueError):
        return residency.total_memory(device) or 1 << 62


def _own_memory() -> int:
    """The private memory of this process now, in bytes."""
    try:
        with open_outside("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file.read().decode().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024
    except (FileError, KeyError, ValueError):
        return 300_000_000

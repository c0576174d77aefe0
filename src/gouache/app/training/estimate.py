"""What a run will take, before it is started: steps, time, disk and memory. `gouache train ... --dry-run`.

The memory is that of one step on the meta device, where tensors have no data; the time that of a few real steps.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gouache.app.model import Model
from gouache.app.settings import Settings
from gouache.app.training import prepare
from gouache.app.training.folder import RunFolder
from gouache.app.training.prepare import OnNote, Prepared
from gouache.diffusion.conditioning import Conditioning
from gouache.errors import FileError
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.record import ModelFile
from gouache.files.source import TORCH_NAMES, size_text
from gouache.model import load as loading
from gouache.outside import open_outside
from gouache.prompts.encode import Sizes
from gouache.training import checkpointing, optimizers
from gouache.training.batch import Batch
from gouache.training.memory import peak_bytes
from gouache.training.objective import Group
from gouache.training.run_settings import RunSettings
from gouache.wording import plural

_TIMED = 3  # steps that are timed, after one that is not
_KERNELS = 1.06  # scratch memory of kernels and what an allocator keeps, as a factor of the tensors'
_CHECKPOINT_PARTS = 4  # weights, two moments, average: the largest usual checkpoint


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds; `advice` says what to change if `fits` is False."""

    steps: int
    epochs: float
    pictures: int
    step_seconds: float
    cache_bytes: int
    checkpoint_bytes: int
    free_bytes: int
    memory_bytes: int
    memory_there: int
    device: str
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.advice

    def lines(self) -> Iterator[str]:
        seconds = self.steps * self.step_seconds
        duration = (
            f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min" if seconds > 90 else "1 min"
        )
        yield f"{plural(self.pictures, 'picture')}, {self.steps} steps, {self.epochs:.1f} epochs"
        if math.isnan(seconds):
            yield "time    not measured, because the memory is not enough"
        else:
            yield f"time    {duration}, {self.step_seconds:.2f} s per step, without samples"
        yield (
            f"disk    {size_text(self.cache_bytes)} of caches, {size_text(self.checkpoint_bytes)} of checkpoints; "
            f"{size_text(self.free_bytes)} are free"
        )
        yield f"memory  {size_text(self.memory_bytes)} of {self.device}'s {size_text(self.memory_there)}"
        yield from (f"advice  {line}" for line in self.advice)


def estimate(settings: RunSettings, folder: RunFolder, user: Settings, *, on_note: OnNote) -> Estimate:
    """Nothing is written but for temporary files. Raises GouacheError for whatever a run would refuse."""
    with tempfile.TemporaryDirectory(prefix="gouache-") as scratch:
        trial = RunFolder(Path(scratch))
        with prepare.prepared(
            settings, trial, user, on_note=on_note, on_work=lambda what, done, total: None, fill_caches=False
        ) as ready:
            return _measured(ready, folder)


def _measured(ready: Prepared, folder: RunFolder) -> Estimate:
    settings, train, batches = ready.settings, ready.settings.train, ready.batches
    epoch = max(1, len(batches))
    needs = batches.needs(range(min(train.steps * train.accumulate, 8 * epoch)))
    groups = ready.objective.parameter_groups()
    trained = sum(parameter.nbytes for group in groups for parameter in group.parameters.values())
    count = train.keep + train.keep_best + (train.steps // train.keep_every if train.keep_every else 0)
    checkpoint = trained * _CHECKPOINT_PARTS * (count + 1)  # one more while it is written
    existing = next(path for path in (folder.path, *folder.path.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    memory = memory_of(ready)
    device = ready.model.device
    there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else _computer_memory()
    seconds = _step_seconds(ready, groups) if memory < there else math.nan
    advice = tuple(_advice(settings, needs.bytes + checkpoint, free, memory, there))
    return Estimate(
        steps=train.steps,
        epochs=train.steps * train.accumulate / epoch,
        pictures=len(ready.pictures.training),
        step_seconds=seconds,
        cache_bytes=needs.bytes if settings.data.cache else 0,
        checkpoint_bytes=checkpoint,
        free_bytes=free,
        memory_bytes=memory,
        memory_there=there,
        device=str(device),
        advice=advice,
    )


def memory_of(ready: Prepared) -> int:
    """The bytes that a run needs at its peak, without running it: one step of a copy of the model on the meta device.

    On the CPU, weights that are mapped from the file in the dtype of the run are not counted: the system can drop them.
    """
    settings, model = ready.settings, ready.model
    copy = loading.load(
        model.file, model.found, device="meta", dtype=model.dtype, vae=_vae_of(model), model_class=type(model)
    )
    for network in (copy.unet, copy.vae, *copy.text_encoders.values()):
        network.requires_grad_(False)
    target = prepare.make_target(settings, copy, model.settings)
    for network in (copy.unet, *copy.text_encoders.values()) if settings.memory.checkpointing else ():
        checkpointing.enable(network)
    objective = replace(
        ready.objective,
        denoiser=copy.denoiser,
        networks=target.networks,
        target=target,
        encode=prepare.text_encoder(settings, copy),
        unconditional=ready.objective.unconditional.to("meta"),
    )
    groups, batch = objective.parameter_groups(), _largest_batch(ready)
    trained = [parameter for group in groups for parameter in group.parameters.values()]

    def step() -> None:
        optimizer = optimizers.build(settings.train, groups)
        for number in range(2):  # the moments exist from the first step on
            objective.losses(batch, number)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    peak = peak_bytes(step)
    weights = sum(parameter.nbytes for parameter in trained)
    frozen = [each for network in (copy.unet, *(copy.text_encoders.values() if target.trains_text else ()))
              for each in network.parameters() if not each.requires_grad]  # fmt: skip
    weights += sum(each.nbytes for each in frozen) if not _is_mapped(model) else 0
    averages = sum(each.numel() * 4 for each in trained) if settings.train.ema_decay else 0
    return round(_KERNELS * (peak + weights + averages)) + _private_memory()


def _vae_of(model: Model) -> tuple[ModelFile, Found] | None:
    return None if model.vae_file is None else (model.vae_file, identify(model.vae_file))


def _is_mapped(model: Model) -> bool:
    """Whether the U-Net's weights are pages of its file."""
    part = model.found.component("unet")
    return model.device.type == "cpu" and TORCH_NAMES[part.dtype.value] == str(model.dtype).removeprefix("torch.")


def _largest_batch(ready: Prepared) -> Batch:
    """A batch of the largest size, on the meta device."""
    batches = ready.batches
    largest = max((row.crop.size for row in batches.rows), key=lambda size: size[0] * size[1])
    count, factor = ready.settings.train.batch, ready.model.vae.spec.factor
    spec = ready.model.unet.spec
    latents = torch.empty(count, spec.out_channels, largest[1] // factor, largest[0] // factor, device="meta")
    sizes = tuple(Sizes(largest) for _ in range(count))
    concat = None
    if spec.in_channels > spec.out_channels or ready.settings.model.inpainting:
        channels = prepare.INPAINTING_CHANNELS - spec.out_channels
        concat = torch.empty(count, channels, *latents.shape[2:], device="meta")
    if ready.target.trains_text:
        return Batch(latents, captions=("a",) * count, sizes=sizes, concat=concat)
    context = torch.empty(count, 77, spec.context_dim, device="meta")
    vector = torch.empty(count, spec.vector_channels, device="meta") if spec.vector_channels else None
    return Batch(latents, Conditioning(context, vector, concat))


def _step_seconds(ready: Prepared, groups: list[Group]) -> float:
    """The time of a step: some are run, with an optimizer of their own, and nothing is kept of them."""
    train = ready.settings.train
    parameters = [parameter for group in groups for parameter in group.parameters.values()]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = optimizers.build(train, groups)
    seconds = []
    try:
        for number in range(_TIMED + 1):
            began = time.perf_counter()
            for part in range(train.accumulate):
                ready.objective.losses(ready.batches(part), part)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if number:
                seconds.append(time.perf_counter() - began)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before):
                parameter.copy_(value)
    return min(seconds)


def _private_memory() -> int:
    """The private memory of this process now, in bytes: what Python and the libraries take."""
    try:
        with open_outside("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file.read().decode().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024
    except (FileError, KeyError, ValueError):
        return 300_000_000


def _computer_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _advice(settings: RunSettings, disk: int, free: int, memory: int, there: int) -> Iterator[str]:
    if disk > free:
        yield f"the disk needs {size_text(disk)}: keep fewer checkpoints (train.keep), or free some space"
    if memory > there:
        ways = []
        if settings.train.batch > 1:
            ways.append(f"train.batch below {settings.train.batch}, with train.accumulate to make up for it")
        if not settings.memory.checkpointing:
            ways.append("memory.checkpointing = true")
        if settings.adapter.form == "none":
            ways.append("a LoRA instead of the weights (adapter.form = lora)")
        ways.append("a smaller data.resolution")
        yield f"the memory needs {size_text(memory)}: set {'; or '.join(ways)}"

"""What a run will take, before it is started: steps, time, disk and memory. `gouache train ... --dry-run`.

Memory and disk are found without reading a weight, so that what does not fit is not tried. If it fits, the time is that
of a few real steps.
"""

from __future__ import annotations

import math
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from gouache.app import machine
from gouache.app.model import Model
from gouache.app.settings import Settings
from gouache.app.training import memory_use, prepare, pretraining, sliders
from gouache.app.training.batches import make_batches
from gouache.app.training.defaults import trainable
from gouache.app.training.folder import RunFolder
from gouache.app.training.memory_use import MemoryUse, available
from gouache.app.training.out_of_memory import ways_to_save
from gouache.app.training.pictures import Pictures, batches_of, paints_class
from gouache.app.training.prepare import OnNote, Prepared
from gouache.app.training.sliders import ConceptBatches
from gouache.files.source import size_text
from gouache.model import residency
from gouache.training import snapshot
from gouache.training.batches import Batches
from gouache.training.retention import is_multiple
from gouache.training.run_settings import RunSettings
from gouache.training.settings import Settings as LoopSettings
from gouache.training.step import accumulate_gradients, clip_gradients, update
from gouache.training.target import Target
from gouache.wording import duration, plural

_KINDS = 3  # of steps that are timed: the most frequent ones, by the sizes of their batches
_TIMED = 2  # steps of each kind, after one that is not timed
_CONCEPTS = 8  # steps that are timed of a run without pictures
_MOST_STEPS = 1000  # whose kinds are counted
_MOST_EXAMPLES = 20_000  # whose entries in the caches are counted


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds; `advice` says what to change if `fits` is False.

    `memory_bytes` is the most that the run takes for itself on `device`, of which `memory_free` can be had.
    `mapped_bytes` are weights that are read from the model's file at every step: without memory for them too, the run
    is as slow as the disk. `checkpoint_bytes` is the size of one checkpoint, of which `checkpoints` are kept at most.
    `class_pictures` are painted before the first step. `concepts` are those of a run without pictures.
    """

    steps: int
    epochs: float
    pictures: int
    class_pictures: int
    step_seconds: float
    cache_bytes: int
    checkpoint_bytes: int
    checkpoints: int
    output_bytes: int
    disk_free: int
    memory_bytes: int
    mapped_bytes: int
    memory_free: int
    device: str
    advice: tuple[str, ...]
    concepts: int = 0

    @property
    def fits(self) -> bool:
        return not self.advice

    def lines(self) -> Iterator[str]:
        data = plural(self.concepts, "concept") if self.concepts else plural(self.pictures, "picture")
        yield f"{data}, {self.steps} steps, {self.epochs:.1f} epochs"
        if self.class_pictures:
            yield f"first   {plural(self.class_pictures, 'picture')} of the class are painted"
        if math.isnan(self.step_seconds):
            yield "time    not measured, because the memory is not enough"
        else:
            yield (
                f"time    {duration(self.steps * self.step_seconds)}, {self.step_seconds:.2f} s per step, without "
                "samples and validation"
            )
        yield (
            f"disk    {size_text(self.cache_bytes)} of caches, {plural(self.checkpoints, 'checkpoint')} of "
            f"{size_text(self.checkpoint_bytes)}, {size_text(self.output_bytes)} for the result; "
            f"{size_text(self.disk_free)} are free"
        )
        mapped = f", and {size_text(self.mapped_bytes)} of the model's file" if self.mapped_bytes else ""
        yield f"memory  {size_text(self.memory_bytes)}{mapped}; {size_text(self.memory_free)} are free on {self.device}"
        yield from (f"advice  {line}" for line in self.advice)


def estimate(settings: RunSettings, folder: RunFolder, user: Settings, *, on_note: OnNote) -> Estimate:
    """Nothing is written but for temporary files. Raises GouacheError for whatever a run would refuse."""
    settings = pretraining.with_initial_model(settings, user)
    _, found = prepare.check_model(settings, user)
    device = residency.device(settings.device or user.device)
    class_pictures = settings.data.class_pictures if paints_class(settings) else 0
    settings = _settled(settings, device, trainable(found).channels, user)
    with tempfile.TemporaryDirectory(prefix="gouache-") as scratch:
        trial = RunFolder(Path(scratch))
        pictures = prepare.read_pictures(settings, trial, on_note, user)
        class_pictures = max(0, class_pictures - sum(each.regularization for each in pictures.training))
        model = prepare.load_model(settings, user, on_note, torch.device("meta"))
        target = prepare.make_target(settings, model, user)
        with _batches(settings, trial, model, target, pictures) as batches:
            cache, epoch = _cache_bytes(settings, batches, model, len(pictures.held_out)), max(1, len(batches))
            if class_pictures:  # with those that are not painted yet
                epoch = batches_of(settings, 1, user, model.size)
            target.detach()
            used = memory_use.memory_use(settings, model, device, batches, user)
        output = used.trained if target.keeps_weights else model.file.nbytes
        free, seconds = available(device), math.nan
        if used.peak + used.mapped < free:
            quiet = {"on_note": lambda line: None, "on_work": lambda what, done, total: None}
            with prepare.prepared(settings, trial, user, **quiet, fill_caches=False) as ready:
                seconds = _step_seconds(ready)
    if class_pictures and isinstance(batches, Batches):
        width, height = max(batches.columns.sizes, key=lambda size: size[0] * size[1])
        cache += class_pictures * 3 * width * height  # as noise; their latents are a few kilobytes each
    count = _kept(settings.train, epoch, seconds)
    existing = next(path for path in (folder.path, *folder.path.absolute().parents) if path.exists())
    disk, disk_free = cache + (count + 1) * used.checkpoint + output, shutil.disk_usage(existing).free
    return Estimate(
        steps=settings.train.steps,
        epochs=settings.train.steps * settings.train.accumulate / epoch,
        pictures=len(pictures.training),
        concepts=len(batches) if isinstance(batches, ConceptBatches) else 0,
        class_pictures=class_pictures,
        step_seconds=seconds,
        cache_bytes=cache,
        checkpoint_bytes=used.checkpoint,
        checkpoints=count,
        output_bytes=output,
        disk_free=disk_free,
        memory_bytes=used.peak,
        mapped_bytes=used.mapped,
        memory_free=free,
        device=str(device),
        advice=tuple(_advice(settings, disk, disk_free, used, free)),
    )


def _settled(settings: RunSettings, device: torch.device, channels: int, user: Settings) -> RunSettings:
    """The settings for a trial, with the dtype that a run would choose."""
    dtype = settings.memory.dtype or ("fp32" if settings.result == "model" else user.dtype)
    dtype = dtype or residency.dtype_name(machine.best_dtype(device, channels, user))
    memory = settings.memory.model_copy(update={"dtype": dtype})
    return settings.model_copy(update={"memory": memory})


@contextmanager
def _batches(
    settings: RunSettings, folder: RunFolder, model: Model, target: Target, pictures: Pictures
) -> Iterator[Batches | ConceptBatches]:
    if settings.mode == "slider":
        concepts = sliders.concepts_of(settings)
        yield ConceptBatches(concepts, sliders.size_of(concepts, model.size))
        return
    with make_batches(settings, folder, model, target, pictures.training) as batches:
        yield batches


def _cache_bytes(settings: RunSettings, batches: Batches | ConceptBatches, model: Model, held_out: int) -> int:
    """The latents and captions of all steps, or of as many as are counted in a moment, and of the held-out pictures."""
    if not settings.data.cache or isinstance(batches, ConceptBatches):
        return 0
    chunk = round((77 * model.unet.spec.context_dim + model.unet.spec.vector_channels) * model.dtype.itemsize)
    count = min(settings.train.steps * settings.train.accumulate, max(1, _MOST_EXAMPLES // settings.train.batch))
    needs = batches.needs(range(count), chunk)
    texts = chunk if needs.texts else 0
    return needs.bytes + held_out * (texts + needs.latent_bytes // max(1, needs.latents))


def _kept(train: LoopSettings, epoch: int, step_seconds: float) -> int:
    """The most checkpoints that are kept at once."""
    by_time = train.save_seconds / step_seconds if step_seconds > 0 else train.save_seconds
    every = [train.save_steps, train.keep_every, train.save_epochs * epoch // train.accumulate, math.ceil(by_time)]
    steps = range(1, train.steps + 1)
    saved = [step for step in steps if step == train.steps or any(is_multiple(step, each) for each in every)]
    older = saved[: -train.keep]
    marked = sum(is_multiple(step, train.keep_every) for step in older)
    validated = sum(train.is_due(step, train.validate_steps) for step in steps if step < saved[-train.keep :][0])
    return min(train.keep, len(saved)) + marked + min(train.keep_best, validated)


def _step_seconds(ready: Prepared) -> float:
    """The mean time of a step: some of each kind are run as the loop does it, and nothing is kept of them."""
    run = snapshot.begin(ready.objective, ready.settings.train)
    done, seconds = 0, 0.0
    kinds = _kinds(ready)
    # Those of concepts take different times, so the mean of several says more than one that is repeated.
    repeats = 1 if isinstance(ready.batches, ConceptBatches) else _TIMED + 1
    for batch, count in kinds:
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            accumulate_gradients(run, ready.batches, batch)
            clip_gradients(run)
            update(run, done)
            times.append(time.perf_counter() - began)
            done += 1
        seconds += count * statistics.mean(times[1:] or times)
    return seconds / sum(count for _, count in kinds)


def _kinds(ready: Prepared) -> list[tuple[int, int]]:
    """(the first batch of such a step, how many there are in an epoch), the most frequent kinds first."""
    batches, train = ready.batches, ready.settings.train
    if isinstance(batches, ConceptBatches):  # which are denoised for different numbers of steps
        return [(number * train.accumulate, 1) for number in range(min(train.steps, _CONCEPTS))]
    batches = cast(Batches, batches)
    first, counts = dict[object, int](), Counter[object]()
    for step in range(min(train.steps, math.ceil(len(batches) / train.accumulate), _MOST_STEPS)):
        numbers = range(step * train.accumulate, (step + 1) * train.accumulate)
        members = [batches.plan.batch(number)[1] for number in numbers]
        kind = tuple(sorted((batches.rows[rows[0]].crop.size, len(rows)) for rows in members))
        first.setdefault(kind, numbers[0])
        counts[kind] += 1
    return [(first[kind], count) for kind, count in counts.most_common(_KINDS)]


def _advice(settings: RunSettings, disk: int, disk_free: int, used: MemoryUse, free: int) -> Iterator[str]:
    if disk > disk_free:
        yield (
            f"the disk needs {size_text(disk)}, {size_text(disk_free)} are free: keep fewer checkpoints (train.keep, "
            "train.keep_best, train.keep_every), or free some space"
        )
    if used.peak + used.mapped > free:
        needed = size_text(used.peak + used.mapped)
        yield f"the memory needs {needed}, {size_text(free)} are free: {ways_to_save(settings)}"

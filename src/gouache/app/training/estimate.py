"""What a run will take, before it is started: steps, time, disk and memory. `gouache train ... --dry-run`.

The memory is that of one step on the meta device, where tensors have no data; the time that of a few real steps.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gouache.app.settings import Settings
from gouache.app.training import prepare
from gouache.app.training.folder import RunFolder
from gouache.app.training.prepare import OnNote, Prepared
from gouache.files.source import size_text
from gouache.training import optimizers
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
        duration = f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"
        yield f"{plural(self.pictures, 'picture')}, {self.steps} steps, {self.epochs:.1f} epochs"
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
    memory, seconds = _run_steps(ready, groups)
    device = ready.model.device
    there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else _computer_memory()
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


def _run_steps(ready: Prepared, groups: list[Group]) -> tuple[int, float]:
    """(bytes, seconds) of a step: some are run, with an optimizer of their own, and nothing is kept of them."""
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
    return round(_KERNELS * _resident()), min(seconds)


def _resident() -> int:
    """The most private memory that this process has had, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


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

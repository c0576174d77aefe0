"""When checkpoints are saved, and which are kept."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from gouache.training import sharded_state
from gouache.training import state as checkpoint
from gouache.training.position import Position
from gouache.training.settings import Settings
from gouache.training.snapshot import Run, capture, estimated_bytes


class Saves:
    """The checkpoints of a run in `folder`. The newest is that of `step`; an epoch has `epoch_batches` (0: unknown)."""

    def __init__(self, run: Run, folder: Path, step: int, epoch_batches: int) -> None:
        """Raises TrainingError if the disk has no space for another checkpoint."""
        self.step = step
        self._run, self._folder, self._epoch_batches = run, folder, epoch_batches
        self._at = time.monotonic()
        if step < run.settings.steps and run.world.is_main:
            checkpoint.check_space(folder, estimated_bytes(run))

    def due(self, position: Position) -> bool:
        """Whether the settings ask for a checkpoint at `position`, after a step."""
        settings = self._run.settings
        return (
            position.step == settings.steps
            or time.monotonic() - self._at > settings.save_seconds
            or is_multiple(position.step, settings.save_steps)
            or is_multiple(position.step, settings.keep_every)
            or ends_epochs(position, settings, self._epoch_batches)
        )

    def save(self, position: Position) -> int:
        """Save the run at `position`, unless that is done, and remove the checkpoints that are not to be kept.

        Returns the number of bytes written.
        """
        if position.step <= self.step:
            return 0
        settings = self._run.settings
        self.step, self._at = position.step, time.monotonic()
        write = None
        if self._run.sharded:
            write = partial(_write_parts, self._run, capture(self._run, position))
        if not self._run.world.is_main:
            if write is not None:
                write(self._folder / f"step-{position.step:08d}.part")
            return 0
        also = protected([checkpoint.number(path) for path in checkpoint.checkpoints(self._folder)], position, settings)
        path = checkpoint.save(self._folder, capture(self._run, position), settings.keep, also, write)
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _write_parts(run: Run, state: checkpoint.State, folder: Path) -> None:
    run.world.barrier()  # the main process has made the folder
    for name, tensors in state.tensors.items():
        sharded_state.write(folder / name, tensors, run.sharded)
    run.world.barrier()


def protected(steps: list[int], position: Position, settings: Settings) -> set[int]:
    """Which of the checkpoints of `steps` are kept however many newer ones there are."""
    best = {step for _, step in position.best[: settings.keep_best]}
    return {step for step in steps if step in best or is_multiple(step, settings.keep_every)}


def is_multiple(step: int, interval: int) -> bool:
    """Whether `step` is a multiple of `interval`; of an interval of 0 there are none."""
    return interval > 0 and step % interval == 0


def ends_epochs(position: Position, settings: Settings, epoch_batches: int) -> bool:
    """Whether the step before `position` was the last of `save_epochs` epochs."""
    if not (settings.save_epochs and epoch_batches):
        return False
    interval = settings.save_epochs * epoch_batches
    return position.number // interval > (position.number - settings.accumulate) // interval

"""A training in stages, from one file: each stage is an ordinary run that starts from the result of an earlier one.

A stage that is done is not repeated, so the same call goes on where it stopped, within a stage and between two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from gouache.app.settings import Settings
from gouache.app.training import runs
from gouache.app.training.folder import STAGES
from gouache.app.training.prepare import Preparation
from gouache.app.training.stage_checks import check
from gouache.app.training.stage_file import file_of, parsed, read, text, to_do
from gouache.files.write import write_atomic
from gouache.training import state
from gouache.training.distributed import processes


def run(
    path: Path,
    user: Settings,
    *,
    on_note: Callable[[str], None],
    on_stage: Callable[[str, int, int], None] | None = None,
    overwrite: bool = False,
    preparations: Mapping[str, Preparation] | None = None,
    **options: Any,
) -> runs.Finished:
    """Train all stages that are not done; returns the end of the last one, or of the one that was stopped.

    `path` is the file, or the folder of the training. `on_stage` receives (name, number from 1, how many).
    `preparations` are those of stages, by name, that have data and objectives of their own; `options` are those of
    `runs.run`. Raises GouacheError, before the first stage begins for what can be known of all. Of several processes
    that `torchrun` started each calls this.
    """
    preparations = preparations or {}
    values = parsed(file_of(path))
    root, stages = read(path)
    finished: runs.Finished | None = None
    with processes(stages[0].settings.device or user.device or "") as world:
        if world.is_main:
            check(stages, user, overwrite, preparations)
        world.barrier()
        with state.locked(root) if world.is_main else nullcontext():
            if world.is_main:
                write_atomic(root / STAGES, text(values, user).encode())
            # Decided once: the main process writes what it depends on. A training that is done reports its end.
            due = world.of_main([stage.name for stage in to_do(stages) or stages[-1:]])
            for number, stage in enumerate(stages, 1):
                if stage.name not in due:
                    continue
                if on_stage is not None and world.is_main:
                    on_stage(stage.name, number, len(stages))
                finished = runs.run(
                    stage.settings, stage.folder, user, on_note=on_note, world=world, stages=file_of(path),
                    preparation=preparations.get(stage.name),
                    overwrite=overwrite or not stage.has_own_output, **options,
                )  # fmt: skip
                if finished.path is None:
                    break
                world.barrier()  # the next one starts from what the main process has written
    assert finished is not None  # there is a stage
    return finished

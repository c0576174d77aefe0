"""The newest weights of a run as a file, also while it trains: for `gouache paint -m RUN` and `--lora RUN`."""

from __future__ import annotations

import shutil
from pathlib import Path

from gouache.app.settings import Settings
from gouache.app.training import export
from gouache.app.training.folder import RunFolder
from gouache.errors import FileError, TrainingError, printable
from gouache.files.write import remove_stale_temporaries, temporary_name


def newest_file(path: Path, settings: Settings) -> Path:
    """The file of the newest checkpoint of the run in the folder `path`, written if there is none of that step yet.

    Its name states the step. A damaged checkpoint is passed over. Raises GouacheError if the run has no checkpoint yet.
    """
    run = RunFolder(path)
    steps = run.steps()
    if not steps:
        shown = printable(str(path))
        raise TrainingError(f"{shown} has no checkpoint yet; wait for one, or ask a run for it: touch {shown}/save-now")
    present = _file(run, steps[-1])
    if is_of(present, run.checkpoint(steps[-1])):
        return present
    try:
        run.newest.mkdir(exist_ok=True)
        # A folder of its own: others may write the same file at the same time, and it states its name.
        remove_stale_temporaries(run.newest, ".draft")
        folder = temporary_name(run.newest, ".draft")
        folder.mkdir()
        try:
            draft = folder / f"{path.resolve().name}.safetensors"
            step = export.export(run, draft, settings)
            file = draft.replace(_file(run, step))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for old in run.newest.glob("*-step-*.safetensors"):
            if old != file:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(
            run.newest,
            f"cannot be written to: {error.strerror}; write the file elsewhere: gouache train export RUN OUT",
        ) from None
    return file


def _file(run: RunFolder, step: int) -> Path:
    return run.newest / f"{run.path.resolve().name}-step-{step:08d}.safetensors"


def is_of(file: Path, checkpoint: Path) -> bool:
    """Whether `file` was written after `checkpoint`, which may be that of a run that was trained again."""
    try:
        return file.stat().st_mtime >= (checkpoint / "manifest.json").stat().st_mtime
    except OSError:
        return False

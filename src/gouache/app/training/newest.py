"""The newest weights of a run as a file, also while it trains: for `gouache paint -m RUN` and `--lora RUN`."""

from __future__ import annotations

from pathlib import Path

from gouache.app.settings import Settings
from gouache.app.training import export
from gouache.app.training.folder import RunFolder
from gouache.errors import TrainingError, printable


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
    if _is_of(present, run.checkpoint(steps[-1])):
        return present
    run.newest.mkdir(exist_ok=True)
    draft = run.newest / f"{path.resolve().name}.safetensors"
    step = export.export(run, draft, settings, overwrite=True)
    for old in run.newest.glob("*-step-*.safetensors"):
        old.unlink(missing_ok=True)
    return draft.replace(_file(run, step))


def _file(run: RunFolder, step: int) -> Path:
    return run.newest / f"{run.path.resolve().name}-step-{step:08d}.safetensors"


def _is_of(file: Path, checkpoint: Path) -> bool:
    """Whether `file` was written after `checkpoint`, which may be that of a run that was trained again."""
    try:
        return file.stat().st_mtime >= (checkpoint / "manifest.json").stat().st_mtime
    except OSError:
        return False

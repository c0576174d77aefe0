"""The newest weights of a run as a file, also while it trains: for `gouache paint -m RUN` and `--lora RUN`."""

from __future__ import annotations

import json
from pathlib import Path

from gouache.app.settings import Settings
from gouache.app.training import export
from gouache.app.training.folder import RunFolder
from gouache.errors import FileError, TrainingError, printable
from gouache.files.write import write_atomic
from gouache.outside import MalformedText, parse_json, read_outside


def newest_file(path: Path, settings: Settings) -> Path:
    """The file of the newest checkpoint of the run in the folder `path`, written if there is none of that step yet.

    Raises GouacheError if the run has no checkpoint yet.
    """
    run = RunFolder(path)
    steps = run.steps()
    if not steps:
        raise TrainingError(f"{printable(str(path))} has no checkpoint yet; wait, or ask for one: touch RUN/save-now")
    if run.newest.is_file() and _step_of(run) == steps[-1]:
        return run.newest
    export.export(run, run.newest, settings, step=str(steps[-1]), overwrite=True)
    write_atomic(_note(run), json.dumps({"step": steps[-1]}).encode())
    return run.newest


def _note(run: RunFolder) -> Path:
    """States the step of the exported file: the run may have written another checkpoint meanwhile."""
    return run.newest.with_suffix(".json")


def _step_of(run: RunFolder) -> int:
    """The step that the exported file states; -1 if it cannot be read."""
    try:
        header = read_outside(_note(run))
        return int(parse_json(header)["step"])
    except (FileError, MalformedText, KeyError, TypeError, ValueError):
        return -1

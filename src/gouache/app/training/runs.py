"""A training run from its settings to the exported file: the main pipeline of `gouache train`.

    settings -> prepare -> loop.train (samples, validation, checkpoints) -> export

A run can be stopped at any moment; the same call goes on with it.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gouache.app import hashes
from gouache.app.settings import Settings
from gouache.app.training import export, out_of_memory, prepare
from gouache.app.training.folder import RunFolder, is_run
from gouache.app.training.prepare import OnNote, OnWork, Prepared
from gouache.app.training.samples import Samples, requests_of
from gouache.errors import FileError, GouacheError, RequestError, is_out_of_memory, printable
from gouache.files.open import open_model
from gouache.files.write import write_atomic
from gouache.outside import MalformedText, parse_toml, read_text
from gouache.training import loop, memory, run_settings
from gouache.training.loop import Progress
from gouache.training.run_settings import RunSettings, template

RUNS = Path("runs")


@dataclass(frozen=True)
class Finished:
    """A run that ended at `step`. `path` is the exported file, None if the run was stopped; `folder` is the run's."""

    folder: Path
    step: int
    path: Path | None
    command: str


def new_folder(settings: RunSettings, *, overwrite: bool = False) -> RunFolder:
    """The folder for a new run, named like its output. Raises RequestError if it, or the output, exists already."""
    output = Path(settings.output)
    folder = RunFolder(RUNS / output.stem)
    if is_run(folder.path):
        shown = printable(str(folder.path))
        raise RequestError(
            "output",
            f"{shown} is a run already; go on with it: gouache train run {shown}, or name another output with -o",
        )
    if output.exists() and not overwrite:
        raise RequestError("output", f"{printable(str(output))} exists; add --overwrite to replace it")
    return folder


def opened(path: Path, overrides: list[str]) -> tuple[RunSettings, RunFolder]:
    """The settings in a file, or of a run's folder, with `overrides`, and the folder that the run is or will be in."""
    folder = RunFolder(path) if is_run(path) else None
    file = folder.settings_file if folder is not None else path
    try:
        values = parse_toml(read_text(file))
    except MalformedText as error:
        raise FileError(file, str(error)) from None
    settings = run_settings.checked(run_settings.with_overrides(values, overrides), printable(file.name))
    if folder is None:
        folder = RunFolder(file.parent) if file.name == "settings.toml" else RunFolder(RUNS / file.stem)
    return settings, folder


def run(
    settings: RunSettings,
    folder: RunFolder,
    user: Settings,
    *,
    on_note: OnNote,
    on_progress: Callable[[Progress], None] | None = None,
    on_work: OnWork | None = None,
    should_stop: Callable[[], bool] | None = None,
    seconds: float = math.inf,
) -> Finished:
    """Train until the last step, or until Ctrl-C, `should_stop` or `seconds`; then the result is exported.

    Raises GouacheError, before any weight is read for whatever can be known then.
    """
    settings = _with_hash(settings, user)
    prepare.check_model(settings, user)
    pictures = prepare.read_pictures(settings, folder, on_note, user)
    _write_settings(settings, folder)
    work = on_work or (lambda what, done, total: None)
    with (
        out_of_memory.explained(settings, folder),
        prepare.prepared(settings, folder, user, on_note=on_note, on_work=work, pictures=pictures) as ready,
    ):
        samples = _samples(ready, folder)
        result = loop.train(
            ready.objective,
            ready.batches,
            settings.train,
            folder.path,
            on_log=on_progress,
            validate=ready.validation,
            on_preview=lambda step: _paint(ready, samples, step, on_note),
            preview_steps=_moments(settings),
            should_stop=should_stop,
            seconds=seconds,
            epoch_batches=len(ready.batches),
            on_note=on_note,
        )
        path = None
        if result.finished:
            path = Path(settings.output)
            export.write(ready, path, *export.read_weights(folder, "last", settings), overwrite=True)
    return Finished(folder.path, result.step, path, _command(settings, path))


def _with_hash(settings: RunSettings, user: Settings) -> RunSettings:
    """The settings with the hash of the model, which a resumed run compares."""
    if settings.model.sha256:
        return settings
    path, _ = prepare.check_model(settings, user)
    digest = hashes.sha256(open_model(path), user)
    return settings.model_copy(update={"model": settings.model.model_copy(update={"sha256": digest})})


def _write_settings(settings: RunSettings, folder: RunFolder) -> None:
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(folder.path, f"cannot be created: {error.strerror}") from None
    write_atomic(folder.settings_file, template(settings).encode())


def _samples(ready: Prepared, folder: RunFolder) -> Samples:
    settings = ready.settings
    default = settings.data.trigger or ready.pictures.training[0].captions[0] or "a picture"
    size = ready.batches.rows[0].crop.size
    requests = requests_of(settings.samples, default, size, settings.model.clip_skip)
    return Samples(ready.model, requests, folder.samples)


def _paint(ready: Prepared, samples: Samples, step: int, on_note: OnNote) -> None:
    """A sample that cannot be painted does not end a run."""
    try:
        memory.trim()  # what the steps leave is in small pieces
        ready.model.reload("text encoder")  # before a prompt attaches adapters to it
        samples.paint(step)
    except GouacheError as error:
        on_note(f"no samples at step {step}: {error}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        on_note(f"no samples at step {step}: {out_of_memory.reason(error)}")
    finally:
        prepare.free_encoders(ready.settings, ready.model, ready.target)


def _moments(settings: RunSettings) -> range | frozenset[int]:
    steps, every = settings.train.steps, settings.samples.every
    if every:
        return range(0, steps + 1, every)
    return frozenset({0, steps // 4, steps // 2, 3 * steps // 4, steps})


def _command(settings: RunSettings, path: Path | None) -> str:
    """The command that paints with the result."""
    if path is None:
        return ""
    prompt = settings.samples.prompts[0] if settings.samples.prompts else settings.data.trigger or "a picture"
    command = ["gouache", "paint", prompt]
    if settings.adapter.form == "none":
        return shlex.join([*command, "-m", str(path)])
    return shlex.join([*command, "-m", settings.model.name, "--lora", str(path)])

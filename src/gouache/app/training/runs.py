"""A training run from its settings to the exported file: the main pipeline of `gouache train`.

    settings -> prepare -> loop.train (samples, validation, checkpoints) -> export

A run can be stopped at any moment; the same call goes on with it.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gouache.app import hashes
from gouache.app.settings import Settings
from gouache.app.training import export, foreign, opening, out_of_memory, prepare, pretraining, tensorboard
from gouache.app.training.batch_changes import changed_processes
from gouache.app.training.folder import RunFolder, is_run
from gouache.app.training.prepare import OnNote, OnWork, Preparation, Prepared, SampleSource
from gouache.app.training.samples import LAST, Samples, default_prompt, most_common, requests_of
from gouache.app.training.tensorboard import Board
from gouache.errors import FileError, GouacheError, TrainingError, is_out_of_memory, printable
from gouache.files.open import open_model
from gouache.files.write import write_atomic
from gouache.prompts import embedding_names
from gouache.prompts.grammar import escape
from gouache.training import loop, memory, state
from gouache.training.distributed import ALONE, World, processes
from gouache.training.loop import Progress, Result
from gouache.training.position import Position
from gouache.training.run_settings import RunSettings, template
from gouache.training.targets.adapter import AdapterTarget


@dataclass(frozen=True)
class Finished:
    """A run that ended at `step` of `steps`.

    `path` is the exported file, with the weights of step `exported`; None if the run was stopped, by `signal` if that
    is not 0. `folder` is the run's. `command` paints with the file. Of several processes, this is number `rank`.
    """

    folder: Path
    step: int
    path: Path | None
    command: str
    steps: int = 0
    exported: int = 0
    signal: int = 0
    rank: int = 0


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
    overwrite: bool = False,
    preparation: Preparation | None = None,
    world: World | None = None,
    stages: Path | None = None,
) -> Finished:
    """Train until the last step, or until Ctrl-C, `should_stop` or `seconds`; then the result is exported.

    A new run replaces a file at its output only with `overwrite`. Raises GouacheError, before any weight is read for
    whatever can be known then. The folder is locked from the preparation to the export.

    Of several processes that `torchrun` started, which must share the folder, each calls this; the first one reports,
    writes and paints. `preparation` replaces that from the pictures of the settings, for data and objectives of a
    recipe's own. `world` is that of processes that are connected already. `stages` is the file of which this run is a
    stage.
    """
    connecting = processes(settings.device or user.device or "") if world is None else nullcontext(world)
    with connecting as world:
        report = (on_note, on_progress, on_work or _ignore) if world.is_main else (_ignore, None, _ignore)
        return _run(world, settings, folder, user, *report, should_stop, seconds, overwrite, preparation, stages)


def _run(
    world: World,
    settings: RunSettings,
    folder: RunFolder,
    user: Settings,
    on_note: OnNote,
    on_progress: Callable[[Progress], None] | None,
    on_work: OnWork,
    should_stop: Callable[[], bool] | None,
    seconds: float,
    overwrite: bool,
    preparation: Preparation | None,
    stages: Path | None,
) -> Finished:
    is_new = not folder.is_started
    if world.is_main and state.is_locked(folder.path):
        raise TrainingError(f"{printable(str(folder.path))}: another run is training here; wait for it")
    opening.check_output(settings, folder, overwrite)
    if world.is_main:  # which writes the file that the others read
        settings = pretraining.with_initial_model(settings, user)
    world.barrier()
    settings = pretraining.with_initial_model(settings, user)
    wants_board = tensorboard.is_wanted(settings.tensorboard) and world.is_main
    path, _ = prepare.check_model(settings, user)
    settings = _with_hash(settings, path, user)
    if settings.model.resume:
        foreign.check(settings, open_model(path))
    if is_new and (note := foreign.hint(settings, open_model(path))):
        on_note(note)
    if preparation is None:
        pictures = prepare.read_pictures(settings, folder, on_note, user)
        preparation = partial(prepare.prepared, pictures=pictures)
    changed = is_run(folder.path) and opening.absolute_paths(settings, user) != folder.settings()
    if not is_new and (note := changed_processes(folder, settings, world.size)):
        on_note(note)
    # Locked before anything long: a second run here is refused at once.
    locked = state.locked(folder.path) if world.is_main else nullcontext()
    with locked, out_of_memory.explained(settings, folder):
        if is_new and world.is_main:
            _write_settings(settings, folder, user)
        world.barrier()
        with (
            preparation(settings, folder, user, on_note=on_note, on_work=on_work, world=world) as ready,
            Board(folder, on_note) if wants_board else nullcontext() as board,
        ):
            if settings.model.resume and world.is_main:
                foreign.begin(ready, folder, on_note)
            world.barrier()
            samples = _samples(ready, folder)

            def begin(position: Position) -> None:
                _write_settings(settings, folder, user)  # only now: a change may have been refused
                export.write_metadata(ready, folder, world.size)
                if changed:
                    samples.forget(position.step)
                if position.step:
                    on_note(_resumed(settings, folder, position, stages))

            def paint(step: int, ending: str) -> None:
                if settings.memory.shard and world.size > 1:
                    _paint(ready, samples, step, ending, on_note, world)
                elif world.is_main:
                    _paint(ready, samples, step, ending, on_note, ALONE)

            def progress(measured: Progress) -> None:
                if board is not None:
                    board.update()
                if on_progress is not None:
                    on_progress(measured)

            result = loop.train(
                ready.objective,
                ready.batches,
                settings.train,
                folder.path,
                on_begin=begin,
                on_log=progress,
                validate=ready.validation,
                on_preview=lambda step: paint(step, ""),
                on_last_preview=(lambda step: paint(step, LAST)) if settings.samples.last else None,
                on_return=samples.forget,
                preview_steps=_moments(settings),
                should_stop=should_stop,
                seconds=seconds,
                epoch_batches=len(ready.batches),
                on_note=on_note,
                lock=False,
                world=world,
            )
            output, exported = None, 0
            if result.finished:
                output = _near(Path(settings.output))
            if result.finished and world.is_main:
                exported = _export(ready, folder, result, on_note, world.size)
    command = _command(settings, ready, output)
    return Finished(
        folder.path, result.step, output, command, settings.train.steps, exported, result.signal, world.rank
    )


def _ignore(*_: object) -> None:
    """What processes other than the main one have to report."""


def _with_hash(settings: RunSettings, path: Path, user: Settings) -> RunSettings:
    """The settings with the hash of the model in `path`, which a resumed run compares."""
    if settings.model.sha256:
        return settings
    digest = hashes.sha256(open_model(path), user)
    return settings.model_copy(update={"model": settings.model.model_copy(update={"sha256": digest})})


def _write_settings(settings: RunSettings, folder: RunFolder, user: Settings) -> None:
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(folder.path, f"cannot be created: {error.strerror}") from None
    write_atomic(folder.settings_file, template(opening.absolute_paths(settings, user)).encode())


def _near(path: Path) -> Path:
    """`path` as it is named from the present folder, if it is in it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _resumed(settings: RunSettings, folder: RunFolder, position: Position, stages: Path | None) -> str:
    """One line on what a run that was called again does."""
    train, step = settings.train, position.step

    def again(key: str, value: int) -> str:
        if stages is not None:
            return f"set {key} = {value} of stage {folder.path.name} in {printable(str(stages))}"
        return f"gouache train run {shlex.quote(printable(str(folder.path)))} --set {key}={value}"

    if step >= train.steps:
        return f"all {train.steps} steps are done; to train more: {again('train.steps', step + train.steps)}"
    if position.without_patience(train):
        return f"patience ended this run at step {step}; to train more: {again('train.patience', 0)}"
    return f"goes on after step {step} of {train.steps}"


def _export(ready: Prepared, folder: RunFolder, result: Result, on_note: OnNote, processes: int) -> int:
    """Write the result: the last checkpoint or, if patience ended the run, the best one. Returns its step."""
    settings, number = ready.settings, result.step
    best = result.best[0] if result.best else 0
    if result.reason == "patience":
        waited = f"validation has not improved for {settings.train.patience} validations"
        if best in folder.steps():
            number = best
            on_note(f"stopped early at step {result.step}: {waited}; exported is the best checkpoint, of step {best}")
        else:
            on_note(f"stopped early at step {result.step}: {waited}; exported is the last checkpoint")
    elif best and best != number and best in folder.steps():
        on_note(
            f"the validation loss was lowest at step {best}; to export that: gouache train export "
            f"{shlex.quote(printable(str(folder.path)))} OUT --step best"
        )
    output = Path(settings.output)
    if said := export.note_on_name(settings, output):
        on_note(said)
    checkpoint = export.read_checkpoint(folder, number, newest=number == result.step, on_note=on_note)
    choice, about = export.choose(settings, "ema" in checkpoint.tensors, output), export.metadata(ready, processes)
    try:
        export.write(ready.target, settings, checkpoint, choice, output, metadata=about, overwrite=True)
    except GouacheError as error:
        shown = printable(str(folder.path))
        raise TrainingError(f"{error}; the run is complete, export it with: gouache train export {shown} OUT") from None
    return checkpoint.step


def _samples(ready: Prepared, folder: RunFolder) -> SampleSource:
    if ready.samples is not None:
        return ready.samples
    size = most_common(ready.batches.sizes)
    if isinstance(ready.target, AdapterTarget) and ready.settings.mode == "slider":
        requests = requests_of(ready.settings, (), size)
        return Samples(
            ready.model, requests, folder.samples, ready.settings.slider.strengths, ready.target.set_strength
        )
    return Samples(ready.model, requests_of(ready.settings, ready.pictures.training, size), folder.samples)


def _paint(ready: Prepared, samples: SampleSource, step: int, ending: str, on_note: OnNote, world: World) -> None:
    """A sample that cannot be painted does not end a run."""
    try:
        memory.trim()  # what the steps leave is in small pieces
        ready.model.reload("text encoder")  # before a prompt attaches adapters to it
        samples.paint(step, ending, world)
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


def _command(settings: RunSettings, ready: Prepared, path: Path | None) -> str:
    """The command that paints with the result, as the samples are painted."""
    if path is None:
        return ""
    if pretraining.trains_on_pictures(settings):
        following = "text" if settings.pretrain.part == "vae" else "unet"
        return shlex.join(["gouache", "train", "pretrain", following, settings.data.folder, "-m", str(path)])
    prompts = settings.samples.prompts or [default_prompt(settings, ready.pictures.training)]
    command = ["gouache", "paint", prompts[0], "-m", settings.model.name]
    match settings.result:
        case "model":
            command[-1] = str(path)
        case "adapter":
            strength = f":{settings.slider.strengths[-1]:g}" if settings.mode == "slider" else ""
            command += ["--lora", f"{path}{strength}"]
        case "embedding":  # prompts know it by the file's name
            command[2] = embedding_names.renamed(command[2], settings.data.trigger, escape(path.stem))
            command += ["--embedding", str(path)]
        case "hypernetwork":
            command += ["--hypernet", str(path)]
    return shlex.join(command)

"""`gouache train`: runs from a folder of pictures, prompts or a settings file. `train_results` shows what they did."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from gouache.cli.text import shown
from gouache.errors import RequestError

if TYPE_CHECKING:
    from gouache.app.training.folder import RunFolder
    from gouache.app.training.runs import Finished
    from gouache.training.run_settings import RunSettings

app = typer.Typer(
    help="Train a LoRA, an embedding, a hypernetwork or a checkpoint on a folder of pictures.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Data = Annotated[
    str, Argument(help="A folder of pictures or tar shards, or kohya's TOML or JSON file.", show_default=False)
]
Model = Annotated[str, Option("--model", "-m", help="The model to start from: a file, a folder, or a name.")]
Set = Annotated[
    list[str] | None,
    Option("--set", help="A setting as key=value, as in the settings file; can be repeated.", show_default=False),
]
DryRun = Annotated[
    bool, Option("--dry-run", help="Train nothing: predict steps, time, disk and memory, and say what would not fit.")
]
Out = Annotated[Path | None, Option("--output", "-o", help="The file to write.", show_default="named like DATA")]
Steps = Annotated[int | None, Option(help="Training steps.", show_default="chosen for the data")]
Trigger = Annotated[str, Option(help="A word put in front of every caption that does not have it.", show_default=False)]
ClassWord = Annotated[str, Option("--class", help="What the subject is, in one or two words.", show_default=False)]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace the file given with -o if it exists.")]
InitWord = Annotated[
    str, Option(help="Words whose vectors it starts as, such as what the subject is.", show_default="*")
]
Vectors = Annotated[int | None, Option(help="How many vectors are trained, each as long as a token.", show_default="1")]
Target = Annotated[str, Option(help="What is changed, such as person.", show_default=False)]
Positive = Annotated[str, Option(help="What positive strengths make of it, such as an old person.", show_default=False)]
Opposite = Annotated[
    str, Option(help="What negative strengths make of it, such as a young person.", show_default=False)
]
Erase = Annotated[str, Option(help="Instead of these: a concept to erase.", show_default=False)]
Size = Annotated[
    str, Option(help="Begin with random weights: tiny, small or sd1 (the released size).", show_default=False)
]
_SIGNALLED = 128  # a shell's exit code of a process that a signal ended, less its number


@app.command()
def lora(
    data: Data, model: Model = "mini", output: Out = None, trigger: Trigger = "", class_word: ClassWord = "",
    steps: Steps = None, settings: Set = None, dry_run: DryRun = False, overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Train a LoRA (or LoCon, LoHa, LoKr, DoRA, IA3, OFT: --set form=...) on a folder of pictures."""
    _start("lora", data, model, output, trigger, class_word, steps, settings, dry_run, overwrite)


@app.command()
def dreambooth(
    data: Data, model: Model = "mini", output: Out = None, trigger: Trigger = "", class_word: ClassWord = "",
    steps: Steps = None, settings: Set = None, dry_run: DryRun = False, overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Teach a model one subject from 3 to 5 pictures, and keep what it knows of the class."""
    _start("dreambooth", data, model, output, trigger, class_word, steps, settings, dry_run, overwrite)


@app.command()
def finetune(
    data: Data, model: Model = "mini", output: Out = None, trigger: Trigger = "", class_word: ClassWord = "",
    steps: Steps = None, settings: Set = None, dry_run: DryRun = False, overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Train the weights of the U-Net itself on a folder of pictures with captions."""
    _start("finetune", data, model, output, trigger, class_word, steps, settings, dry_run, overwrite)


@app.command()
def embedding(
    data: Data, model: Model = "mini", output: Annotated[
        Path | None, Option("--output", "-o", help="The file to write, .safetensors or .pt.",
                            show_default="named like the word")
    ] = None,
    trigger: Annotated[str, Option(help="The word that prompts will say for the pictures.", show_default=False)] = "",
    init_word: InitWord = "", vectors: Vectors = None, steps: Steps = None, settings: Set = None,
    dry_run: DryRun = False, overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Train an embedding (textual inversion): a new word for what the pictures show."""
    given = _given({"embedding.init_word": init_word, "embedding.vectors": vectors})
    _start("embedding", data, model, output, trigger, "", steps, [*given, *(settings or [])], dry_run, overwrite)


@app.command()
def hypernetwork(
    data: Data, model: Model = "mini", output: Annotated[
        Path | None, Option("--output", "-o", help="The .pt file to write.", show_default="named like DATA")
    ] = None,
    trigger: Trigger = "", steps: Steps = None, settings: Set = None, dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Train a hypernetwork, as AUTOMATIC1111's web UI reads it: small networks in front of the keys and values."""
    _start("hypernetwork", data, model, output, trigger, "", steps, settings, dry_run, overwrite)


@app.command()
def slider(
    prompts: Annotated[
        str, Argument(help="A file of prompts as of LECO or kohya's scripts; or use the options below.",
                      show_default=False)
    ] = "",
    model: Model = "mini", output: Annotated[
        Path | None, Option("--output", "-o", help="The file to write.", show_default="named like PROMPTS")
    ] = None,
    target: Target = "", positive: Positive = "", opposite: Opposite = "", erase: Erase = "", steps: Steps = None,
    settings: Set = None, dry_run: DryRun = False, overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Train a LoRA from prompts alone: a slider between two descriptions, or the erasure of a concept."""
    given = _given({
        "slider.target": target, "slider.positive": positive, "slider.opposite": opposite, "slider.erase": erase,
    })  # fmt: skip
    _start("slider", prompts, model, output, "", "", steps, [*given, *(settings or [])], dry_run, overwrite)


@app.command()
def pretrain(
    part: Annotated[str, Argument(metavar="vae|text|unet", help="The part that is trained.", show_default=False)],
    data: Data,
    model: Annotated[
        str, Option("--model", "-m", help="The model to go on with; without it --size.", show_default=False)
    ] = "",
    size: Size = "", output: Out = None, steps: Steps = None, settings: Set = None,
    dry_run: DryRun = False, overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Train a model from nothing, part by part: autoencoder, text encoder, U-Net. Each result is a whole model."""
    given = _given({"pretrain.part": part, "pretrain.initial_size": size})
    _start("pretrain", data, model, output, "", "", steps, [*given, *(settings or [])], dry_run, overwrite)


@app.command()
def new(
    mode: Annotated[str, Argument(help="What to train, such as lora or embedding.", show_default=False)],
    output: Annotated[Path, Option("--output", "-o", help="The settings file to write.", show_default=False)],
    data: Annotated[str, Argument(help="As for `gouache train MODE`; of a slider, a file of prompts.",
                                  show_default=False)] = "",
    model: Annotated[str, Option("--model", "-m", help="The model to start from: a file, a folder, or a name.",
                                 show_default="mini")] = "",
    trigger: Trigger = "", class_word: ClassWord = "", init_word: InitWord = "", vectors: Vectors = None,
    target: Target = "", positive: Positive = "", opposite: Opposite = "", erase: Erase = "",
    part: Annotated[str, Option(help="The part to pretrain: vae, text or unet.", show_default=False)] = "",
    size: Size = "", steps: Steps = None, settings: Set = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file.")] = False,
) -> None:  # fmt: skip
    """Write a commented settings file, with values chosen for this model, data and device."""
    from gouache.files.write import write_atomic, write_new
    from gouache.training.run_settings import template
    from gouache.workshop.save import writing

    if output.suffix.lower() != ".toml":
        raise RequestError("output", f"{shown(output)} does not end in .toml; this command writes a settings file")
    given = _given({
        "embedding.init_word": init_word, "embedding.vectors": vectors, "slider.target": target,
        "slider.positive": positive, "slider.opposite": opposite, "slider.erase": erase, "pretrain.part": part,
        "pretrain.initial_size": size,
    })  # fmt: skip
    given += settings or []
    chosen = _chosen(mode, data, model, None, trigger, class_word, steps, given, settings_file=output)
    text = template(chosen).encode()
    with writing(output, overwrite):
        (write_atomic if overwrite else write_new)(output, text)
    print(f"{shown(output)} is written; start the run with: gouache train run {_quoted(output)}")


@app.command()
def run(
    settings_file: Annotated[
        Path,
        Argument(metavar="SETTINGS.toml|RUN", help="A settings file, or the folder of a run.", show_default=False),
    ],
    settings: Set = None,
    dry_run: DryRun = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file at the settings' output.")] = False,
) -> None:
    """Start the run of a settings file, or go on with it where it stopped; a file may have several stages."""
    from gouache.app.training import opening
    from gouache.app.training.stage_file import has_stages

    if has_stages(settings_file):
        if settings:
            raise RequestError("set", "is for single runs; change the file of the stages")
        _train_stages(settings_file, dry_run, overwrite)
        return
    chosen, folder = opening.opened(settings_file, settings or [])
    _train(chosen, folder, dry_run, overwrite)


def _given(options: Mapping[str, str | int | None]) -> list[str]:
    """The options that are given, as `key=value`."""
    found = {key: value for key, value in options.items() if value not in ("", None)}
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in found.items()]


def _start(
    mode: str,
    data: str,
    model: str,
    output: Path | None,
    trigger: str,
    class_word: str,
    steps: int | None,
    overrides: list[str] | None,
    dry_run: bool,
    overwrite: bool,
) -> None:
    from gouache.app.settings import read
    from gouache.app.training import opening

    chosen = _chosen(mode, data, model, output, trigger, class_word, steps, overrides)
    folder = opening.new_folder(chosen, read(), overwrite=overwrite)
    _train(chosen, folder, dry_run, overwrite)


def _chosen(
    mode: str,
    data: str,
    model: str,
    output: Path | None,
    trigger: str,
    class_word: str,
    steps: int | None,
    overrides: list[str] | None,
    settings_file: Path | None = None,
) -> RunSettings:
    from gouache.app.settings import read
    from gouache.app.training import defaults
    from gouache.cli.progress import Bar

    with Bar() as bar:
        return defaults.choose(
            mode, data, model, output=output, trigger=trigger, class_word=class_word, steps=steps,
            overrides=overrides or [], settings=read(), settings_file=settings_file, on_work=bar.show,
        )  # fmt: skip


def _train(chosen: RunSettings, folder: RunFolder, dry_run: bool, overwrite: bool) -> None:
    from gouache.app.settings import read
    from gouache.app.training import estimate, opening, runs
    from gouache.cli.training_progress import TrainingProgress

    if dry_run:
        opening.check_output(chosen, folder, overwrite)
        found = estimate.estimate(chosen, folder, read(), on_note=note)
        for line in found.lines():
            print(line)
        if not found.fits:
            sys.exit(1)
        return
    try:
        with TrainingProgress() as progress:
            finished = runs.run(
                chosen, folder, read(), on_note=progress.note, on_progress=progress.show, on_work=progress.work,
                overwrite=overwrite,
            )  # fmt: skip
    except KeyboardInterrupt:  # while it was prepared, or a second one
        if folder.settings_file.exists():
            print(f"stopped; to go on: gouache train run {_quoted(folder.path)}", file=sys.stderr)
            sys.exit(_SIGNALLED + signal.SIGINT)
        raise
    _finished(finished)


def _train_stages(path: Path, dry_run: bool, overwrite: bool) -> None:
    from gouache.app.settings import read
    from gouache.app.training import stage_status, stages
    from gouache.cli.training_progress import TrainingProgress

    if dry_run:
        found = stage_status.estimate_all(path, read(), on_note=note)
        for line in stage_status.estimate_lines(found):
            print(line)
        if not stage_status.fits(found):
            sys.exit(1)
        return
    try:
        with TrainingProgress() as progress:
            finished = stages.run(
                path, read(), on_note=progress.note, on_progress=progress.show, on_work=progress.work,
                on_stage=lambda name, number, count: progress.note(f"stage {name}, {number} of {count}"),
                overwrite=overwrite,
            )  # fmt: skip
    except KeyboardInterrupt:  # while it was prepared, or a second one
        print(f"stopped; to go on: gouache train run {_quoted(path)}", file=sys.stderr)
        sys.exit(_SIGNALLED + signal.SIGINT)
    _finished(finished, path)


def _finished(finished: Finished, again: Path | None = None) -> None:
    """`again` is what to name to go on; None: the run's folder."""
    if finished.path is None and finished.rank:  # the first of several processes prints
        sys.exit(_SIGNALLED + (finished.signal or signal.SIGINT))
    if finished.path is None:
        print(
            f"stopped at step {finished.step} of {finished.steps}, which is saved; to go on: "
            f"gouache train run {_quoted(again or finished.folder)}",
            file=sys.stderr,
        )
        sys.exit(_SIGNALLED + (finished.signal or signal.SIGINT))
    if finished.rank:
        return
    print(shown(finished.path))
    purpose = "go on" if finished.command.startswith("gouache train") else "paint with it"
    print(f"to {purpose}: {finished.command}", file=sys.stderr)


def _quoted(path: Path) -> str:
    """`path` for a command line."""
    return shlex.quote(shown(path))


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)

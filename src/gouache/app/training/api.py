"""`gouache.train`: a training run from Python, as `gouache train` starts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gouache.app import names
from gouache.app.settings import Settings, read
from gouache.app.training import defaults, opening, runs
from gouache.app.training.folder import RunFolder
from gouache.app.training.prepare import OnWork
from gouache.app.training.runs import Finished
from gouache.errors import RequestError, printable
from gouache.training.loop import Progress
from gouache.training.run_settings import TABLES, RunSettings, toml


def train(
    mode: str,
    data: str | Path,
    *,
    model: str | Path = "",
    output: str | Path | None = None,
    trigger: str = "",
    class_word: str = "",
    steps: int | None = None,
    folder: str | Path | None = None,
    settings: Settings | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_work: OnWork | None = None,
    on_note: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    overwrite: bool = False,
    **changes: Any,
) -> Finished:
    """Train a "lora", "dreambooth", "finetune", "embedding" or "hypernetwork" on a folder of pictures, or a
    "slider" on a file of prompts; or "pretrain" a part of a model: `pretrain={"part": "vae", "initial_size": "tiny"}`.

    `model` is the one to start from, by default `mini`, in pretraining none. `output` is the file to write,
    replaced only with `overwrite`; `folder` that of the run (default: `runs/` and the name of the output). The same
    call with the same `folder` goes on with a run that was stopped; other `data` or another `model` are refused
    then. `trigger` is put in front of captions without it, and is the word of an embedding; `class_word` says what
    the subject is. `changes` are settings by name, as in the settings file: `rank=8`, `learning_rate=1e-4`,
    `adapter={"form": "loha"}`. `on_progress` receives the loss, rate and time left, `on_work` (what, done, total)
    of the preparation, `on_note` one line each. `should_stop` is polled between steps; if it returns True, or on
    Ctrl-C, the run is saved and the result has no path. Raises GouacheError, before any weight is read for what can
    be known then.
    """
    user = settings or read()
    overrides = [text for name, value in changes.items() for text in _overrides(name, value)]
    run = None if folder is None else RunFolder(Path(folder))
    if run is not None and run.is_started:
        given = {"mode": mode, "train.steps": steps, "data.trigger": trigger, "data.class_word": class_word,
                 "output": None if output is None else str(output)}  # fmt: skip
        texts = [f"{name}={toml(value)}" for name, value in given.items() if value not in (None, "")]
        chosen, run = opening.opened(run.path, [*texts, *overrides])
        _check_same(run, chosen, str(data), str(model), user)
    else:
        chosen = defaults.choose(
            mode, str(data), str(model), output=None if output is None else Path(output), trigger=trigger,
            class_word=class_word, steps=steps, overrides=overrides, settings=user, on_work=on_work,
        )  # fmt: skip
        run = run or opening.new_folder(chosen, user, overwrite=overwrite)
    return runs.run(
        chosen, run, user, on_note=on_note or (lambda line: None), on_progress=on_progress, on_work=on_work,
        should_stop=should_stop, overwrite=overwrite,
    )  # fmt: skip


def _check_same(run: RunFolder, chosen: RunSettings, data: str, model: str, user: Settings) -> None:
    """Raises RequestError if a run that has begun has other data or another model than those of the call."""
    pairs = [
        (
            "data",
            data,
            Path(data).expanduser().absolute(),
            Path(chosen.data.folder or chosen.slider.file).expanduser().absolute(),
        )
    ]
    if model:
        pairs.append(("model", model, names.resolve(model, user), names.resolve(chosen.model.name, user)))
    for name, given, path, present in pairs:
        if path.resolve() != present.resolve():
            raise RequestError(
                name,
                f"is {printable(given)}, but the run in {printable(str(run.path))} has begun with "
                f"{printable(str(present))}; use that, or another folder for a new run",
            )


def _overrides(name: str, value: Any) -> list[str]:
    """`key=value` texts; a dictionary is a table of the settings file."""
    if name in TABLES and isinstance(value, dict):
        return [f"{name}.{key}={toml(each)}" for key, each in value.items()]
    return [f"{name}={toml(value)}"]

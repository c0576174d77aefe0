"""Where a run is: its folder and settings, before anything is trained."""

from __future__ import annotations

from pathlib import Path

from gouache.app import names
from gouache.app.settings import Settings
from gouache.app.training import export
from gouache.app.training.folder import RunFolder, is_run
from gouache.errors import FileError, RequestError, printable
from gouache.outside import MalformedText, parse_toml, read_text
from gouache.training import run_settings
from gouache.training.aliases import EPOCHS
from gouache.training.overrides import with_overrides
from gouache.training.run_settings import RunSettings

RUNS = Path("runs")
_PATHS = ("output", "data.folder", "data.class_folder", "data.cache_folder", "slider.file")
_MODELS = {"model.name": "", "model.vae": "vae", "adapter.start": "lora"}  # what is looked for in the library


def new_folder(settings: RunSettings, user: Settings, *, overwrite: bool = False) -> RunFolder:
    """The folder for a new run, named like its output. Raises RequestError if it, or the output, exists already.

    The folder of a run that has not begun to train may be used again, by one of the same mode, model and data.
    """
    output = Path(settings.output)
    folder = RunFolder(_named_like(output, "output"))
    if folder.is_started or (is_run(folder.path) and not _is_same(absolute_paths(settings, user), folder.settings())):
        shown = printable(str(folder.path))
        raise RequestError(
            "output",
            f"{shown} is a run already; go on with it: gouache train run {shown}, or name another output with -o",
        )
    check_output(settings, folder, overwrite)
    return folder


def _is_same(one: RunSettings, two: RunSettings) -> bool:
    """Whether these are of the same mode, model and data; other values may have been corrected between two tries."""
    mine = [
        (each.mode, each.model.name, each.data.folder, each.data.trigger, each.pretrain.part, each.slider)
        for each in (one, two)
    ]
    return mine[0] == mine[1]


def _named_like(file: Path, setting: str) -> Path:
    """The folder of a run whose output or settings file this is. Raises RequestError for a name that is none."""
    if not file.stem.strip("."):  # the present folder, or the one above
        raise RequestError(
            setting, f"{printable(str(file))} names no folder for the run; expected a name such as zorb{file.suffix}"
        )
    return RUNS / file.stem


def opened(path: Path, overrides: list[str]) -> tuple[RunSettings, RunFolder]:
    """The settings in a file, or of a run's folder, with `overrides`, and the folder that the run is or will be in."""
    folder = RunFolder(path) if is_run(path) else None
    if folder is None and path.is_dir():
        raise RequestError(
            "run", f"{printable(str(path))} is not the folder of a training run: it has no settings.toml"
        )
    file = folder.settings_file if folder is not None else path
    try:
        values = parse_toml(read_text(file))
    except MalformedText as error:
        raise FileError(file, str(error)) from None
    values = with_overrides(values, overrides)
    if isinstance(train := values.get("train"), dict) and EPOCHS.partition(".")[2] in train:
        raise RequestError("train.epochs", "is for new runs, whose pictures are counted; of this one set train.steps")
    settings = run_settings.checked(values, printable(file.name))
    if folder is None:
        is_of_run = file.name == "settings.toml" and (file.parent / "lock").exists()
        folder = RunFolder(file.parent if is_of_run else _named_like(file, "run"))
    return settings, folder


def check_output(settings: RunSettings, folder: RunFolder, overwrite: bool) -> None:
    """Before hours of training: raises GouacheError if the result of a new run in `folder` cannot be written."""
    if folder.is_started:
        return
    if not settings.output:
        raise RequestError("output", "is empty; name the file to write")
    output = Path(settings.output)
    export.check_output(export.choose(settings, False, output), output, overwrite)


def absolute_paths(settings: RunSettings, user: Settings) -> RunSettings:
    """The settings with absolute paths, so that the run can be gone on with from any folder; names remain names."""
    found = settings.model_copy(update={"output": absolute("output", settings.output, user)})
    for key in (*_PATHS, *_MODELS):
        table, _, name = key.partition(".")
        if name:
            values = getattr(found, table)
            value = absolute(key, getattr(values, name), user)
            found = found.model_copy(update={table: values.model_copy(update={name: value})})
    return found


def absolute(key: str, text: str, user: Settings) -> str:
    """The value `text` of a setting, such as `model.name`: as an absolute path if it is one, else as it is."""
    if not text or (key == "model.vae" and text.lower() in ("automatic", "none")):
        return text
    path = Path(text).expanduser()
    if key in _MODELS:
        is_path = path.exists() and (is_run(path) or names.resolve(text, user, _MODELS[key]) == path)
    else:
        is_path = key in _PATHS
    return str(path.absolute()) if is_path else text

"""A training in stages, from one file: each stage is an ordinary run that starts from the result of an earlier one.

    RUN/stages.toml, RUN/NAME/ (the run of a stage), RUN/NAME.safetensors (its result); the last result is `output`

A stage that is done is not repeated, so the same call goes on where it stopped, within a stage and between two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gouache.app import names
from gouache.app.settings import Settings
from gouache.app.training import estimate, export, pretraining, runs
from gouache.app.training.estimate import Estimate
from gouache.app.training.folder import RunFolder, is_run
from gouache.app.training.prepare import Preparation
from gouache.app.training.status import Status, status
from gouache.errors import FileError, RequestError, printable
from gouache.files.source import size_text
from gouache.files.write import write_atomic
from gouache.outside import MalformedText, parse_toml, read_text
from gouache.training import run_settings
from gouache.training.run_settings import RunSettings, toml

FILE = "stages.toml"
_OWN = ("name", "start")  # keys of a stage that are not settings
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,60}")
# What may differ when a stage that is done is read again: it does not change the result.
_FREE = ("output", "device", "tensorboard", "memory", "samples", "model.name", "model.sha256", "data.cache",
         "data.cache_folder", "data.workers")  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """`settings` of the run in `folder`; `start` is the stage whose result it trains, None if it has its own model."""

    name: str
    settings: RunSettings
    folder: RunFolder
    start: Stage | None = None

    @property
    def result(self) -> Path:
        return Path(self.settings.output)

    @property
    def is_done(self) -> bool:
        return is_run(self.folder.path) and status(self.folder).finished and self.result.is_file()


def has_stages(path: Path) -> bool:
    """Whether `path` is a file of stages, or the folder of such a training."""
    if path.is_dir():
        return (path / FILE).is_file()
    return path.suffix.lower() == ".toml" and path.is_file() and "stages" in _parsed(path)


def read(path: Path) -> tuple[Path, list[Stage]]:
    """The folder of the training and its stages, in order. Raises FileError or RequestError, naming stage and key."""
    file = path / FILE if path.is_dir() else path
    values = _parsed(file)
    root = file.parent if file.name == FILE and any(map(is_run, file.parent.iterdir())) else runs.RUNS / file.stem
    root = path if path.is_dir() else root
    shared, tables = {key: value for key, value in values.items() if key != "stages"}, values["stages"]
    if not isinstance(tables, list) or not tables or not all(isinstance(each, dict) for each in tables):
        raise FileError(file, "has no [[stages]]; expected one table or more, each with a name")
    stages: list[Stage] = []
    for number, table in enumerate(tables, 1):
        stages.append(_stage(file, root, shared, table, number == len(tables), stages))
    return root, stages


def _parsed(file: Path) -> dict[str, Any]:
    try:
        return parse_toml(read_text(file))
    except MalformedText as error:
        raise FileError(file, str(error)) from None


def _stage(
    file: Path, root: Path, shared: Mapping[str, Any], table: Mapping[str, Any], is_last: bool, before: Sequence[Stage]
) -> Stage:
    name, where = table.get("name"), f"{printable(file.name)} stage {len(before) + 1}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"{where} name", "is missing or not a plain name of letters and digits, such as large-set")
    known = {stage.name: stage for stage in before}
    if name in known:
        raise RequestError(f"{where} name", f"{name} is that of two stages; each needs its own")
    own = {key: value for key, value in table.items() if key not in _OWN}
    start = table.get("start", before[-1].name if before else "")
    if "start" in table and start not in known:
        raise RequestError(f"{where} start", f"{printable(str(start), 60)!r} is not an earlier stage")
    merged = _merged(shared, own)
    chosen = known.get(start) if not own.get("model", {}).get("name") and not _is_initial(own) else None
    if chosen is not None:
        if chosen.settings.result != "model":
            raise RequestError(
                f"{where} start",
                f"{start} gives no model but a file of mode {chosen.settings.mode}; start from another stage",
            )
        # Whose result has its size and family; a hash in the shared table is that of the first model.
        model = {"name": str(chosen.result), "sha256": ""}
        merged = _merged(merged, {"model": model, "pretrain": {"initial_size": ""}})
    if not is_last or "output" in own:
        suffix = ".pt" if merged.get("mode") == "hypernetwork" else ".safetensors"
        merged["output"] = own.get("output") or str(root / f"{name}{suffix}")
    try:
        settings = run_settings.checked(merged, f"{printable(file.name)} stage {name}:")
    except RequestError as error:
        raise RequestError(error.setting, str(error).removeprefix(f"{error.setting}: ")) from None
    return Stage(name, settings, RunFolder(root / name), chosen)


def _is_initial(own: Mapping[str, Any]) -> bool:
    table = own.get("pretrain")
    return isinstance(table, Mapping) and bool(table.get("initial_size"))


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`shared` with the keys of `own`, those of tables one by one."""
    found = {key: dict(value) if isinstance(value, Mapping) else value for key, value in shared.items()}
    for key, value in own.items():
        is_table = isinstance(value, Mapping) and isinstance(found.get(key, {}), Mapping)
        found[key] = {**found.get(key, {}), **value} if is_table else value
    return found


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

    `on_stage` receives (name, number from 1, how many). `preparations` are those of stages, by name, that have data and
    objectives of their own; `options` are those of `runs.run`. Raises GouacheError, before the first stage begins for
    what can be known of all.
    """
    own = preparations or {}
    file = path / FILE if path.is_dir() else path
    root, stages = read(path)
    check(stages, user, overwrite, own)
    root.mkdir(parents=True, exist_ok=True)
    write_atomic(root / FILE, _text(_parsed(file)).encode())
    finished: runs.Finished | None = None
    for number, stage in enumerate(stages, 1):
        if stage.is_done and number < len(stages):
            continue
        if on_stage is not None:
            on_stage(stage.name, number, len(stages))
        again = overwrite or number < len(stages)  # a result between stages is the training's own
        finished = runs.run(
            stage.settings, stage.folder, user, on_note=on_note, overwrite=again, preparation=own.get(stage.name),
            **options,
        )  # fmt: skip
        if finished.path is None:
            break
    assert finished is not None
    return finished


def check(stages: Sequence[Stage], user: Settings, overwrite: bool, without_data: Container[str] = ()) -> None:
    """Raises GouacheError for what can be known of all stages before one begins."""
    for stage in stages:
        if is_run(stage.folder.path) and status(stage.folder).finished:
            _check_unchanged(stage, user)
        if stage.start is None and not stage.settings.pretrain.initial_size:
            names.resolve(stage.settings.model.name, user)
        folder = stage.settings.data.folder
        has_pictures = stage.settings.mode != "slider" and stage.name not in without_data
        if has_pictures and "{" not in folder and not Path(folder).exists():  # {: of shards
            raise RequestError(f"stage {stage.name}: data.folder", f"{printable(repr(folder))} does not exist")
    last = stages[-1]
    if not last.settings.output:
        raise RequestError("output", "is missing; name the file of the last stage's result")
    if not last.folder.is_started:
        output = Path(last.settings.output)
        export.check_output(export.choose(last.settings, False, output), output, overwrite)


def _check_unchanged(stage: Stage, user: Settings) -> None:
    """Raises RequestError if a stage that is done has other settings than it was trained with."""
    before, now = (
        _flat(each) for each in (stage.folder.settings(), runs.absolute_paths(stage.settings, user))
    )  # fmt: skip
    for key in before:
        if before[key] != now[key]:
            raise RequestError(
                f"stage {stage.name}: {key}",
                f"is {printable(repr(now[key]), 60)}, but this stage is done and was trained with "
                f"{printable(repr(before[key]), 60)}; undo that, or remove {printable(str(stage.folder.path))} and "
                "what follows it",
            )


def _flat(settings: RunSettings) -> dict[str, Any]:
    """The settings that change the result, as `table.key`."""
    found = dict[str, Any]()
    for key, value in settings.model_dump(mode="json").items():
        own = {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
        found |= {name: each for name, each in own.items() if key not in _FREE and name not in _FREE}
    return found


_PATHS = {"data": ("folder", "class_folder", "cache_folder"), "model": ("name", "vae"), "adapter": ("start",),
          "slider": ("file",)}  # fmt: skip


def _text(values: Mapping[str, Any]) -> str:
    """The file with absolute paths, so that the training can be gone on with from any folder."""
    lines = ["# A training in stages. Start it, or go on with it: gouache train run THIS_FOLDER"]
    tables = [key for key, value in values.items() if isinstance(value, Mapping)]
    absolute = {key: _absolute(key, value) for key, value in values.items() if key != "stages"}
    lines += [f"{key} = {toml(value)}" for key, value in absolute.items() if key not in tables]
    for key in tables:
        lines += ["", f"[{key}]", *(f"{name} = {toml(value)}" for name, value in absolute[key].items())]
    for stage in values["stages"]:
        lines += ["", "[[stages]]", *(f"{key} = {toml(_absolute(key, value))}" for key, value in stage.items())]
    return "\n".join(lines) + "\n"


def _absolute(key: str, value: Any) -> Any:
    """A value of the file with absolute paths where it names files that exist, and for results."""
    if isinstance(value, Mapping):
        return {name: _path(each) if name in _PATHS.get(key, ()) else each for name, each in value.items()}
    return str(Path(value).expanduser().absolute()) if key == "output" and isinstance(value, str) and value else value


def _path(value: Any) -> Any:
    is_file = isinstance(value, str) and value and Path(value).expanduser().exists()
    return str(Path(value).expanduser().absolute()) if is_file else value


@dataclass(frozen=True)
class StageStatus:
    """`status` is None for a stage that has not begun."""

    stage: Stage
    status: Status | None

    def to_json(self) -> dict[str, Any]:
        own = None if self.status is None else self.status.to_json()
        return {"name": self.stage.name, "mode": _mode(self.stage), "result": str(self.stage.result), "run": own}


def all_status(path: Path) -> list[StageStatus]:
    """What every stage has done. Raises GouacheError."""
    _, stages = read(path)
    return [StageStatus(each, status(each.folder) if is_run(each.folder.path) else None) for each in stages]


def lines(found: Sequence[StageStatus]) -> Iterator[str]:
    """A table for a terminal."""
    rows = [("stage", "mode", "state", "step", "loss", "validation", "result")]
    for each in found:
        own, settings = each.status, each.stage.settings
        loss, validation = ("" if value is None else f"{value:.4g}" for value in (
            (None, None) if own is None else (own.loss, own.validation)))  # fmt: skip
        done = "0" if own is None else str(own.step)
        result = str(each.stage.result) if each.stage.result.is_file() else ""
        state = "not started" if own is None else own.state
        rows.append((each.stage.name, _mode(each.stage), state, f"{done} of {settings.train.steps}", loss, validation,
                     printable(result)))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def _mode(stage: Stage) -> str:
    settings = stage.settings
    return f"pretrain {settings.pretrain.part}" if settings.mode == "pretrain" else settings.mode


def estimate_all(path: Path, user: Settings, *, on_note: Callable[[str], None]) -> list[tuple[Stage, Estimate]]:
    """What each stage that is not done will take. Models that do not exist yet are taken to be like their start's."""
    _, stages = read(path)
    check(stages, user, True)
    found = list[tuple[Stage, Estimate]]()
    for stage in stages:
        if stage.is_done:
            continue
        settings, first = stage.settings, stage
        while first.start is not None and not first.start.is_done:
            first = first.start
        if first is not stage:
            tables = {"model": first.settings.model, "pretrain": stage.settings.pretrain.model_copy(
                update={"initial_size": first.settings.pretrain.initial_size})}  # fmt: skip
            if stage.settings.mode != "pretrain" and first.settings.pretrain.initial_size:
                of_first = pretraining.with_initial_model(first.settings, user)
                tables = {"model": of_first.model}
            settings = settings.model_copy(update=tables)
        found.append((stage, estimate.estimate(settings, stage.folder, user, on_note=on_note)))
    return found


def estimate_lines(found: Sequence[tuple[Stage, Estimate]]) -> Iterator[str]:
    """For a terminal: each stage, then the sum."""
    for stage, each in found:
        yield f"stage {stage.name}"
        yield from (f"  {line}" for line in each.lines())
    seconds = sum(each.steps * each.step_seconds for _, each in found)
    disk = sum(each.cache_bytes + each.checkpoints * each.checkpoint_bytes + each.output_bytes for _, each in found)
    yield f"in all  {sum(each.steps for _, each in found)} steps, {seconds / 60:.0f} min, {size_text(disk)} of disk"

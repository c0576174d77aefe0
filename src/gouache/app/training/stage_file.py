"""The file of a training in stages, and what of each stage is on the disk.

RUN/stages.toml, RUN/NAME/ (the run of a stage), RUN/NAME.safetensors (its result); the last result is `output`
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gouache.app.settings import Settings
from gouache.app.training import opening
from gouache.app.training.folder import STAGES, RunFolder, is_run
from gouache.app.training.newest import is_of
from gouache.app.training.status import status
from gouache.errors import FileError, RequestError, printable
from gouache.outside import MalformedText, parse_toml, read_text
from gouache.training import run_settings
from gouache.training.run_settings import TABLES, RunSettings, toml

LOCK = "lock"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,60}")
_FILES = (".toml", ".safetensors", ".pt")  # a stage's folder must not have the name of a file


@dataclass(frozen=True)
class Stage:
    """`settings` of the run in `folder`; `start` is the stage whose result it trains, None if it has its own model.

    `has_own_output`: the file says where its result is written; otherwise that is in the folder of the training.
    `shared` are the settings at the top of the file that the stage does not replace, as `table.key`.
    """

    name: str
    settings: RunSettings
    folder: RunFolder
    start: Stage | None = None
    has_own_output: bool = False
    shared: frozenset[str] = frozenset()

    def where(self, setting: str) -> str:
        """What a message about a setting begins with."""
        return f"stage {self.name}{' (shared)' if setting in self.shared else ''}:"

    @property
    def mode(self) -> str:
        return self.settings.title

    @property
    def result(self) -> Path:
        return Path(self.settings.output)

    @property
    def is_finished(self) -> bool:
        """Whether all of its steps are done, which may have become more; the result may be missing."""
        if not self.has_ended:
            return False
        before, now = self.folder.settings().train, self.settings.train
        return now.steps <= before.steps and now.patience == before.patience

    @property
    def has_ended(self) -> bool:
        """Whether the steps that it was trained with are done."""
        return is_run(self.folder.path) and status(self.folder).finished

    @property
    def has_result(self) -> bool:
        """Whether it is finished and its result is that of the newest checkpoint."""
        if not self.is_finished or not self.result.is_file():
            return False
        steps = self.folder.steps()  # none if the user has removed them
        return not steps or is_of(self.result, self.folder.checkpoint(steps[-1]))


def to_do(stages: Sequence[Stage]) -> list[Stage]:
    """Those that are not finished, and those whose missing result is needed.

    It is needed if one of these starts from it, or if nothing does: then it is what is wanted.
    """
    found = list[Stage]()
    for stage in reversed(stages):
        following = [each for each in stages if each.start is stage]
        is_needed = not following or any(each in found for each in following)
        if not stage.is_finished or (is_needed and not stage.has_result):
            found.insert(0, stage)
    return found


def has_stages(path: Path) -> bool:
    """Whether `path` is a file of stages, or the folder of such a training. Raises FileError."""
    if path.is_dir():
        return (path / STAGES).is_file()
    return path.suffix.lower() == ".toml" and path.is_file() and "stages" in parsed(path)


def read(path: Path) -> tuple[Path, list[Stage]]:
    """The folder of the training and its stages, in order. Raises FileError or RequestError, naming stage and key."""
    file = file_of(path)
    values = parsed(file)
    is_of_training = path.is_dir() or (file.name == STAGES and (file.parent / LOCK).exists())
    root = file.parent if is_of_training else opening.RUNS / file.stem
    if is_run(root):
        raise RequestError(
            "run", f"{printable(str(root))} is the folder of a single run; give {file.name} another name"
        )
    tables, shared = values["stages"], {key: value for key, value in values.items() if key != "stages"}
    if not isinstance(tables, list) or not tables or not all(isinstance(each, dict) for each in tables):
        raise FileError(file, "has no [[stages]]; expected one table or more, each with a name")
    _check_tables(shared, printable(file.name))
    stages: list[Stage] = []
    for number, table in enumerate(tables, 1):
        stages.append(_stage(file, root, shared, table, number == len(tables), stages))
    return root, stages


def file_of(path: Path) -> Path:
    return path / STAGES if path.is_dir() else path


def parsed(file: Path) -> dict[str, Any]:
    """Raises FileError."""
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
    if name.lower().endswith(_FILES) or name.lower() == LOCK:
        raise RequestError(f"{where} name", f"{name} is the name of a file; expected one such as large-set")
    if name.casefold() in (stage.name.casefold() for stage in before):  # some disks do not distinguish them
        raise RequestError(f"{where} name", f"{name} is that of two stages; each needs its own")
    own = {key: value for key, value in table.items() if key not in ("name", "start")}
    where = f"{printable(file.name)} stage {name}:"
    _check_tables(own, where)
    start = _start(table, own, where, before)
    merged = _merged(shared, own)
    if start is not None:
        # The result has its size and family; a hash in the shared table is that of the first model.
        merged = _merged(merged, {"model": {"name": str(start.result), "sha256": ""}})
        merged = _merged(merged, {"pretrain": {"initial_size": ""}})
    has_own_output = bool(own.get("output")) or is_last
    if not is_last or own.get("output"):
        suffix = ".pt" if merged.get("mode") == "hypernetwork" else ".safetensors"
        merged["output"] = own.get("output") or str(root / f"{name}{suffix}")
    only_shared = frozenset({*_keys(shared)} - {*_keys(own)})
    try:
        settings = run_settings.checked({**merged, "lineage_name": name})
    except RequestError as error:
        key, text = error.setting, str(error).removeprefix(f"{error.setting}: ")
        whose = f"{printable(file.name)} (shared)" if _of_table(key) in only_shared else where
        raise RequestError(f"{whose} {key}", text) from None
    return Stage(name, settings, RunFolder(root / name), start, has_own_output, only_shared)


def _keys(values: Mapping[str, Any]) -> Iterator[str]:
    """The settings in these tables, as `table.key`, and the tables."""
    for key, value in values.items():
        yield key
        yield from (f"{key}.{name}" for name in value) if isinstance(value, Mapping) else ()


def _of_table(key: str) -> str:
    """`table.key` without what follows for an item of a list."""
    return ".".join(key.split(".")[:2])


def _start(
    table: Mapping[str, Any], own: Mapping[str, Any], where: str, before: Sequence[Stage]
) -> Stage | None:  # fmt: skip
    """The stage whose result a stage trains: the one named, or the one before; None if it has a model of its own."""
    begins = bool(own.get("model", {}).get("name") or own.get("pretrain", {}).get("initial_size"))
    if "start" in table:
        found = next((stage for stage in before if stage.name == table["start"]), None)
        if found is None:
            shown = printable(str(table["start"]), 60)
            raise RequestError(f"{where} start", f"{shown!r} is not an earlier stage")
        if begins:
            raise RequestError(f"{where} start", "excludes model.name and pretrain.initial_size; leave out one of them")
    else:
        found = before[-1] if before and not begins else None
    if found is not None and (settings := found.settings).result != "model":
        form = f", adapter.form = {settings.adapter.form}" if settings.result == "adapter" else ""
        raise RequestError(
            f"{where} start",
            f"{found.name} gives no model: its result is of the kind {settings.result} (mode = {settings.mode}{form}); "
            "start from another stage",
        )
    return found


def _check_tables(values: Mapping[str, Any], where: str) -> None:
    for key, value in values.items():
        if key in TABLES and not isinstance(value, Mapping):
            raise RequestError(f"{where} {key}", f"is {printable(repr(value), 40)}; expected a table")


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`shared` with the keys of `own`, those of tables one by one."""
    found = {key: dict(value) if isinstance(value, Mapping) else value for key, value in shared.items()}
    for key, value in own.items():
        is_table = isinstance(value, Mapping) and isinstance(found.get(key, {}), Mapping)
        found[key] = {**found.get(key, {}), **value} if is_table else value
    return found


def text(values: Mapping[str, Any], user: Settings) -> str:
    """The file with absolute paths, so that the training can be gone on with from any folder."""
    lines = ["# A training in stages. Start it, or go on with it: gouache train run THIS_FOLDER"]
    absolute = {key: _absolute(key, value, user) for key, value in values.items() if key != "stages"}
    tables = [key for key, value in values.items() if isinstance(value, Mapping)]
    lines += [f"{key} = {toml(value)}" for key, value in absolute.items() if key not in tables]
    for key in tables:
        lines += ["", f"[{key}]", *(f"{name} = {toml(value)}" for name, value in absolute[key].items())]
    for stage in values["stages"]:
        lines += ["", "[[stages]]", *(f"{key} = {toml(_absolute(key, value, user))}" for key, value in stage.items())]
    return "\n".join(lines) + "\n"


def _absolute(key: str, value: Any, user: Settings) -> Any:
    if isinstance(value, Mapping):
        return {name: _absolute(f"{key}.{name}", each, user) for name, each in value.items()}
    return opening.absolute(key, value, user) if isinstance(value, str) else value

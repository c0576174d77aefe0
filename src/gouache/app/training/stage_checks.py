"""What can be known of all stages before one begins, so that a mistake in the last one is not found after days."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gouache.app import hashes, names
from gouache.app.settings import Settings
from gouache.app.training import export, opening, prepare, pretraining
from gouache.app.training.pictures import buckets_of, read_data
from gouache.app.training.stage_file import Stage, to_do
from gouache.errors import GouacheError, RequestError, TrainingError, printable
from gouache.files.open import open_model
from gouache.training.run_settings import RunSettings

# What may differ when a stage that is finished is read again: it does not change the result.
_FREE = ("output", "device", "tensorboard", "lineage_name", "memory", "samples", "model.name", "model.sha256",
         "data.cache", "data.cache_folder", "data.workers")  # fmt: skip


def check(stages: Sequence[Stage], user: Settings, overwrite: bool, without_data: Container[str] = ()) -> None:
    """Raises GouacheError, which names the stage, if one cannot be trained or was trained otherwise.

    Of stages that are done only the settings and the start are compared: their pictures may be gone. One may be given
    more steps while none that starts from it has begun. The data of the stages `without_data` are not those of their
    settings.
    """
    _check_outputs(stages)
    for stage in stages:
        with _naming(stage):
            if stage.folder.is_started:
                _check_start(stage, user)
            followed = any(each.start is stage and each.folder.is_started for each in stages)
            if stage.is_finished or (stage.has_ended and followed):
                _check_unchanged(stage, user)
    due = to_do(stages)
    for stage in due:  # first what takes no time
        settings, folder = stage.settings, stage.settings.data.folder
        with _naming(stage):
            if stage.has_own_output:
                may_replace = overwrite or stage.folder.is_started
                export.check_output(export.choose(settings, False, stage.result), stage.result, may_replace)
            if _has_pictures(stage, without_data) and not folder:
                raise RequestError("data.folder", "is missing; name a folder of pictures")
            if _has_pictures(stage, without_data) and "{" not in folder and not Path(folder).exists():  # {: of shards
                raise RequestError("data.folder", f"{printable(repr(folder))} does not exist")
    for stage in due:
        with _naming(stage):
            settings = with_existing_model(stage, user)
            prepare.check_model(settings, user)
            if _has_pictures(stage, without_data):
                pretraining.check_pairs(settings, read_data(settings, user).records)
                if settings.data.resolution:
                    buckets_of(settings, (0, 0))


def _has_pictures(stage: Stage, without_data: Container[str]) -> bool:
    return stage.settings.mode != "slider" and stage.name not in without_data


def with_existing_model(stage: Stage, user: Settings) -> RunSettings:
    """The settings of a stage; if the model that it starts from is not trained yet, with the one that that starts from.

    They have the same networks. A file of random weights is written if it is needed.
    """
    first = stage
    while first.start is not None and not first.start.has_result:
        first = first.start
    found = pretraining.with_initial_model(first.settings, user)
    if first is stage:
        return found
    own = stage.settings.model
    model = {
        "name": found.model.name, "sha256": "", "family": own.family or found.model.family,
        "prediction": own.prediction or found.model.prediction,
    }  # fmt: skip
    return stage.settings.model_copy(update={"model": own.model_copy(update=model)})


@contextmanager
def _naming(stage: Stage) -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        text = str(error).removeprefix(f"{error.setting}: ")
        raise RequestError(f"{stage.where(error.setting)} {error.setting}", text) from None
    except GouacheError as error:
        raise TrainingError(f"stage {stage.name}: {error}") from None


def _check_outputs(stages: Sequence[Stage]) -> None:
    names = dict[Path, str]()
    for stage in stages:
        if not stage.settings.output:
            raise RequestError("output", "is missing; name the file of the last stage's result")
        other = names.setdefault(stage.result.absolute(), stage.name)
        if other != stage.name:
            shown = printable(str(stage.result))
            raise RequestError(f"stage {stage.name}: output", f"{shown} is that of stage {other} too; name another")


def _check_start(stage: Stage, user: Settings) -> None:
    """Raises TrainingError if a stage that has begun did so from another file than it would now."""
    shown = printable(str(stage.folder.path))
    again = f"restore it, or remove {shown} and what follows it to train that again"
    start, settings = stage.start, stage.settings
    if start is not None and not start.is_finished:
        raise TrainingError(f"{shown} has begun, but {start.name}, which it starts from, is not trained; {again}")
    if settings.pretrain.initial_size or (start is not None and not start.has_result):
        return
    try:
        path = names.resolve(settings.model.name, user) if start is None else start.result
    except GouacheError:
        if stage.is_finished:
            return  # it is not needed any more
        raise
    before = stage.folder.settings().model.sha256
    if before and before != (now := hashes.sha256(open_model(path), user)):
        raise TrainingError(
            f"has begun with another file than {printable(str(path))} is now: SHA-256 {before[:12]}, now {now[:12]}; "
            f"{again}"
        )


def _check_unchanged(stage: Stage, user: Settings) -> None:
    """Raises RequestError if a stage that is finished has other settings than it was trained with."""
    before, now = _flat(stage.folder.settings()), _flat(opening.absolute_paths(stage.settings, user))
    for key in before:
        if before[key] != now[key]:
            raise RequestError(
                key,
                f"is {printable(repr(now[key]), 60)}, but this stage is done and was trained with "
                f"{printable(repr(before[key]), 60)}; undo that (a stage that is not done can have its own value), or "
                f"remove {printable(str(stage.folder.path))} and what follows it",
            )


def _flat(settings: RunSettings) -> dict[str, Any]:
    """The settings that change the result, as `table.key`."""
    found = dict[str, Any]()
    for key, value in settings.model_dump(mode="json").items():
        own = {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
        found |= {name: each for name, each in own.items() if key not in _FREE and name not in _FREE}
    return found

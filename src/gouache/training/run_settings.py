"""All settings of a training run, as in its TOML file: what is trained, from which model, on which pictures, and how.

`settings_tables` has the tables; `template` writes a commented file from them. The names of other trainers
(`network_dim`, `learning_rate_te1`, ...) are accepted for `--set`, see `aliases`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from gouache.errors import FileError, RequestError, printable
from gouache.outside import MalformedText, parse_toml, read_text
from gouache.training.settings import Settings, setting
from gouache.training.settings_tables import (
    AdapterSettings,
    DataSettings,
    EmbeddingSettings,
    HypernetworkSettings,
    LossSettings,
    MemorySettings,
    ModelSettings,
    PartsSettings,
    PretrainSettings,
    SampleSettings,
    SliderSettings,
    Table,
    ValidationSettings,
)

Mode = Literal["lora", "dreambooth", "finetune", "embedding", "hypernetwork", "slider", "pretrain"]
MODES = get_args(Mode)
Result = Literal["model", "adapter", "embedding", "hypernetwork"]
"""What kind of file a run writes."""


class RunSettings(Table):
    """Everything that a run depends on, apart from the content of its files."""

    mode: Mode = setting("lora", f"{', '.join(MODES[:-1])} or {MODES[-1]}.")
    output: str = setting("", "The file to write at the end, or when `gouache train export` asks.")
    device: str = setting("", "cpu, cuda, mps; empty: the best there is.")
    lineage: Literal["none", "hashed", "plain"] = setting(
        "hashed", "What the file says of its data: nothing, hashes, or names and tag counts as kohya's."
    )
    lineage_name: str = setting("", "What the file calls this training in its lineage; of a stage, its name.")
    tensorboard: Literal["auto", "yes", "no"] = setting(
        "auto", "Write TensorBoard files into the run's folder; auto: if tensorboardX is installed."
    )
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    adapter: AdapterSettings = AdapterSettings()
    embedding: EmbeddingSettings = EmbeddingSettings()
    hypernetwork: HypernetworkSettings = HypernetworkSettings()
    pretrain: PretrainSettings = PretrainSettings()
    slider: SliderSettings = SliderSettings()
    parts: PartsSettings = PartsSettings()
    train: Settings
    loss: LossSettings = LossSettings()
    validation: ValidationSettings = ValidationSettings()
    samples: SampleSettings = SampleSettings()
    memory: MemorySettings = MemorySettings()

    @property
    def title(self) -> str:
        """What is trained, in words: the mode, and the part of a pretraining."""
        return f"pretrain {self.pretrain.part}" if self.mode == "pretrain" else self.mode

    @property
    def result(self) -> Result:
        """What kind of file the run writes; the weights of the model are trained for a "model" alone."""
        if self.mode in ("embedding", "hypernetwork"):
            return self.mode
        if self.mode == "pretrain":
            return "model"
        return "model" if self.adapter.form == "none" else "adapter"


TABLES = {name: field.annotation for name, field in RunSettings.model_fields.items() if name not in (
    "mode", "output", "device", "lineage", "lineage_name", "tensorboard")}  # fmt: skip


def read(path: Path) -> RunSettings:
    """The settings in a TOML file. Raises FileError or RequestError naming the key."""
    try:
        table = parse_toml(read_text(path))
    except MalformedText as error:
        raise FileError(path, str(error)) from None
    return checked(table, printable(path.name))


def checked(values: Mapping[str, Any], where: str = "") -> RunSettings:
    """`values` as RunSettings. Raises RequestError naming the first key that is unknown or impossible."""
    try:
        settings = RunSettings.model_validate(dict(values))
        template(settings).encode()  # what cannot be written into the settings file
        return settings
    except UnicodeEncodeError as error:
        near = ascii(error.object[max(0, error.start - 20) : error.end])
        raise RequestError(where or "settings", f"have bytes that are not text in UTF-8, at {near}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, [*keys(), "stages"], n=1)
            message = "is not a setting" + (
                f"; did you mean {near[0].replace('stages', '[[stages]]')}?" if near else "; see `gouache train new`"
            )
        elif fault["type"] == "missing":
            message = "is missing and has no default"
        else:
            given = "" if isinstance(fault["input"], Mapping) else f", received {fault['input']!r}"
            said = fault["msg"].removeprefix("Value error, ")  # names of values in it keep their case
            message = printable(said[:1].lower() + said[1:] + given, 200)
        raise RequestError(f"{where + ' ' if where else ''}{printable(key)}", message) from None


def keys() -> Iterator[str]:
    """Every setting, as `table.key`; those outside tables by their key."""
    for name, field in RunSettings.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from (f"{name}.{key}" for key in annotation.model_fields)
        else:
            yield name


def template(settings: RunSettings) -> str:
    """A commented TOML file of these settings, with every key; reading it gives them back."""
    lines = ["# Settings of a training run. Start it, or go on with it: gouache train run THIS_FILE"]
    tables: list[str] = []
    for name, field in RunSettings.model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            tables += ["", f"[{name}]"]
            for key, inner in type(value).model_fields.items():
                tables += _lines(key, getattr(value, key), inner.description)
        else:
            lines += _lines(name, value, field.description)
    return "\n".join([*lines, *tables]) + "\n"


def _lines(key: str, value: object, description: str | None) -> list[str]:
    text = toml(value)
    commented = f"# {key} = " if text is None else f"{key} = {text}"
    return [*([f"# {description}"] if description else []), commented]


def toml(value: object) -> str | None:
    """A value as TOML; None if TOML has no such value."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        inner = (f"{json.dumps(name, ensure_ascii=False)} = {toml(each)}" for name, each in value.items())
        return "{" + ", ".join(inner) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(each) or '""' for each in value) + "]"
    if isinstance(value, PurePath):
        value = str(value)
    return json.dumps(value, ensure_ascii=False)

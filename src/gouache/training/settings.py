"""The settings of a training run, as in a table of a TOML file. Unknown or impossible values are refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from gouache.errors import FileError, RequestError, printable
from gouache.outside import MalformedText, parse_toml, read_text

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """Everything the loop reads, and the batch size. Steps are optimizer steps; times are in seconds.

    The learning rate increases linearly over `warmup` steps, then stays constant or decreases along half a cosine to
    `final_rate * learning_rate` after the last step. `optimizer` is a name in `optimizers.TABLE` or the dotted path of
    a class; `optimizer_arguments` are passed to it and override `betas`. With `ema_decay` 0 no average is kept.
    `save_seconds` limits how much work a crash can lose; `keep` is the number of checkpoints kept.

    `changeable` are the settings that may differ when a run is resumed. Changes are recorded in the checkpoint and act
    from the next step on. With a cosine schedule, a change of `steps` changes the rates still to come.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    changeable: ClassVar[frozenset[str]] = frozenset(
        {"learning_rate", "schedule", "warmup", "final_rate", "steps"}  # the learning rates still to come
        | {"log_steps", "validate_steps", "save_seconds", "keep"}  # not what the steps compute
    )

    steps: int = Field(gt=0)
    batch: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: int = Field(default=100, ge=0)
    final_rate: float = Field(default=0.05, ge=0, le=1)
    optimizer: str = "adamw"
    optimizer_arguments: dict[str, JsonValue] = {}
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    clip_norm: float = Field(default=1.0, gt=0)
    ema_decay: Fraction = 0.999
    accumulate: int = Field(default=1, gt=0)
    seed: int = Field(default=0, ge=0)
    log_steps: int = Field(default=50, gt=0)
    validate_steps: int = Field(default=1000, gt=0)
    save_seconds: float = Field(default=300, gt=0)
    keep: int = Field(default=2, gt=0)

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        height = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * height)


def read(path: Path, section: str) -> Settings:
    """The settings in table `[section]` of a TOML file. Raises FileError or RequestError, naming the key."""
    try:
        table = parse_toml(read_text(path))
    except MalformedText as error:
        raise FileError(path, str(error)) from None
    if not isinstance(table.get(section), dict):
        raise FileError(path, f"has no table [{section}]; it has {printable(', '.join(table)) or 'none'}")
    return checked(table[section], f"{printable(path.name)} [{section}]")


def checked(values: dict[str, object], where: str) -> Settings:
    """`values` as Settings. Raises RequestError naming the first key that is unknown or out of range."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        if fault["type"] == "extra_forbidden":
            message = f"is not a training setting; known settings: {', '.join(Settings.model_fields)}"
        elif fault["type"] == "missing":
            message = "is missing and has no default"
        else:
            message = printable(f"{fault['msg'].lower()}, got {fault['input']!r}")
        raise RequestError(f"{where} {printable('.'.join(map(str, fault['loc'])))}", message) from None

"""The settings of a training run, as in a table of a TOML file. Unknown or impossible values are refused by name."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from gouache.errors import FileError, RequestError, printable
from gouache.outside import MalformedText, parse_toml, read_text
from gouache.training import rates

Fraction = Annotated[float, Field(ge=0, lt=1)]
StepsOrShare = Annotated[int | float, Field(ge=0)]
"""A number of steps, or below 1 a share of all steps."""


class Settings(BaseModel):
    """Everything the loop reads, and the batch size. Steps are optimizer steps; times are in seconds.

    The learning rate increases linearly over `warmup` steps; then it follows `schedule`, a name in `rates.SCHEDULES` or
    the dotted path of a class, and is at least `final_rate * learning_rate`. `restarts` belong to "cosine", `power` to
    "polynomial", `decay` to "warmup-stable-decay", `schedule_arguments` to a class.

    `optimizer` is a name in `optimizers.TABLE` or the dotted path of a class; `optimizer_arguments` are passed to it
    and override `betas`. Gradients are scaled to a norm of at most `clip_norm` (0: never). Weights in half precision
    are trained through float32 copies ("master"), or rounded at random ("stochastic"), see `rounding`. With
    `ema_decay` 0 no average is kept; `ema_on_cpu` keeps it in the memory of the computer.

    A checkpoint is saved every `save_seconds`, and every `save_steps` and `save_epochs` where these are not 0. Kept are
    the last `keep`, the `keep_best` with the lowest validation loss, and those whose step is a multiple of `keep_every`
    (0: none). Validation is every `validate_steps`. If it has not improved by more than `minimum_change` for `patience`
    validations (0: for ever), the run ends. A step whose loss or gradient `not_finite` either stops the run or is
    skipped.

    `changeable` are the settings that may differ when a run is resumed: all of them. Changes are recorded in the
    checkpoint and act from the next step on. With another optimizer, or other arguments of it, its state starts anew.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    changeable: ClassVar[frozenset[str]]

    steps: int = Field(gt=0)
    batch: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    schedule: str = "cosine"
    schedule_arguments: dict[str, JsonValue] = {}
    warmup: StepsOrShare = 100
    final_rate: float = Field(default=0.05, ge=0, le=1)
    restarts: int = Field(default=0, ge=0)
    power: float = Field(default=2.0, gt=0)
    decay: StepsOrShare = 0.2
    optimizer: str = "adamw"
    optimizer_arguments: dict[str, JsonValue] = {}
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    clip_norm: float = Field(default=1.0, ge=0)
    rounding: Literal["master", "stochastic"] = "master"
    ema_decay: Fraction = 0.999
    ema_on_cpu: bool = False
    accumulate: int = Field(default=1, gt=0)
    seed: int = Field(default=0, ge=0)
    log_steps: int = Field(default=50, gt=0)
    validate_steps: int = Field(default=1000, gt=0)
    patience: int = Field(default=0, ge=0)
    minimum_change: float = Field(default=0.0, ge=0)
    save_seconds: float = Field(default=300, gt=0)
    save_steps: int = Field(default=0, ge=0)
    save_epochs: int = Field(default=0, ge=0)
    keep: int = Field(default=2, gt=0)
    keep_best: int = Field(default=1, ge=0)
    keep_every: int = Field(default=0, ge=0)
    not_finite: Literal["stop", "skip"] = "stop"

    @field_validator("schedule")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in rates.SCHEDULES and "." not in name:
            known = ", ".join(rates.SCHEDULES)
            raise ValueError(f"input should be {known}, or the dotted path of a class")
        return name

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        return rates.rate(self, step)

    def is_due(self, step: int, interval: int) -> bool:
        """Whether `step` steps are a multiple of `interval`, or all of them."""
        return step % interval == 0 or step == self.steps

    @cached_property
    def imported_rates(self) -> list[float]:
        """Those of a schedule given by its path, for each step after the warm-up."""
        return rates.imported_rates(self)


Settings.changeable = frozenset(Settings.model_fields)


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
            problem = fault["msg"].removeprefix("Value error, ")
            message = printable(f"{problem[0].lower()}{problem[1:]}, got {fault['input']!r}", 400)
        raise RequestError(f"{where} {printable('.'.join(map(str, fault['loc'])))}", message) from None

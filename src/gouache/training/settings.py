"""The settings of a training run, as in a table of a TOML file. Unknown or impossible values are refused by name."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from gouache.training import rates

Fraction = Annotated[float, Field(ge=0, lt=1)]
StepsOrShare = Annotated[int | float, Field(ge=0)]
"""A number of steps, or below 1 a share of all steps."""


def setting(default: Any, sentence: str, **limits: Any) -> Any:
    """A key of a settings file with its default, what it means in a sentence, and its limits (gt, ge, lt, le)."""
    return Field(default, description=sentence, **limits)


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

    steps: int = setting(..., "Optimizer steps of the whole run.", gt=0)
    batch: int = setting(..., "Pictures per batch.", gt=0)
    learning_rate: float = setting(..., "The highest learning rate, after the warm-up.", gt=0)
    schedule: str = setting("cosine", f"How the rate falls: {', '.join(rates.SCHEDULES)}, or the path of a class.")
    schedule_arguments: dict[str, JsonValue] = setting({}, "Arguments of that class.")
    warmup: StepsOrShare = setting(100, "Steps in which the rate rises to its highest; below 1: a share of all.")
    final_rate: float = setting(0.05, "The lowest rate, relative to learning_rate.", ge=0, le=1)
    restarts: int = setting(0, "How often a cosine schedule starts again.", ge=0)
    power: float = setting(2.0, "Of a polynomial schedule.", gt=0)
    decay: StepsOrShare = setting(0.2, "Last steps of warmup-stable-decay, in which the rate falls, or their share.")
    optimizer: str = setting("adamw", "adamw, adafactor, sgd, muon, prodigy, lion, ..., or the path of a class.")
    optimizer_arguments: dict[str, JsonValue] = setting({}, "Its other arguments.")
    weight_decay: float = setting(0.01, "How strongly weights are drawn to 0.", ge=0)
    betas: tuple[Fraction, Fraction] = setting((0.9, 0.99), "Of Adam's moments.")
    clip_norm: float = setting(1.0, "Gradients are scaled down to this norm; 0: never.", ge=0)
    rounding: Literal["master", "stochastic"] = setting(
        "master", "Weights in half precision: float32 copies are trained, or updates are rounded at random."
    )
    ema_decay: Fraction = setting(0.999, "Of the running average of the weights (EMA); 0: none is kept.")
    ema_on_cpu: bool = setting(False, "Keep that average in the memory of the computer.")
    accumulate: int = setting(1, "Batches per optimizer step.", gt=0)
    seed: int = setting(0, "Of everything random in the run.", ge=0)
    log_steps: int = setting(50, "Steps between lines of the log.", gt=0)
    validate_steps: int = setting(1000, "Steps between validations.", gt=0)
    patience: int = setting(0, "End after so many validations without a lower loss; 0: never.", ge=0)
    minimum_change: float = setting(0.0, "By how much the loss must be lower to count as such.", ge=0)
    save_seconds: float = setting(300, "Seconds between checkpoints.", gt=0)
    save_steps: int = setting(0, "Steps between checkpoints; 0: by time alone.", ge=0)
    save_epochs: int = setting(0, "Epochs between checkpoints; 0: by time alone.", ge=0)
    keep: int = setting(2, "How many of the newest checkpoints are kept.", gt=0)
    keep_best: int = setting(1, "How many with the lowest validation loss are kept besides.", ge=0)
    keep_every: int = setting(0, "Checkpoints whose step is a multiple of this are kept for ever; 0: none.", ge=0)
    not_finite: Literal["stop", "skip"] = setting(
        "stop", "After NaN or Inf: stop, or go back to the last good state and skip the batch."
    )

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

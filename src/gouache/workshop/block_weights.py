"""A weight for each block of the U-Net: as a list of numbers, by label, or as one of the usual curves."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from gouache.errors import FileError, RequestError
from gouache.layouts.blocks import Block, block_of, blocks
from gouache.nn.spec import UNetSpec

BASE = "BASE"  # the label of what is no part of the U-Net

# Curves over the blocks, from the first (0) to the last (1); the base has the weight 0 in all but the flat ones.
PRESETS: Mapping[str, Callable[[float], float]] = {
    "ALL_A": lambda x: 0.0,
    "ALL_B": lambda x: 1.0,
    "FLAT_25": lambda x: 0.25,
    "FLAT_50": lambda x: 0.5,
    "FLAT_75": lambda x: 0.75,
    "GRAD_V": lambda x: abs(2 * x - 1),
    "GRAD_A": lambda x: 1 - abs(2 * x - 1),
    "LINEAR": lambda x: x,
    "REVERSE_LINEAR": lambda x: 1 - x,
    "SMOOTHSTEP": lambda x: x * x * (3 - 2 * x),
    "REVERSE_SMOOTHSTEP": lambda x: 1 - x * x * (3 - 2 * x),
    "COSINE": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "REVERSE_COSINE": lambda x: 0.5 * (1 - math.cos(math.pi * x)),
    "WRAP": lambda x: float(abs(2 * x - 1) > 2 / 3),
    "RING": lambda x: float(1 / 3 < abs(2 * x - 1) <= 2 / 3),
    "MID": lambda x: float(abs(2 * x - 1) <= 1 / 3),
    "IN": lambda x: float(x < 0.5),
    "OUT": lambda x: float(x > 0.5),
}
_FLAT = ("ALL_B", "FLAT_25", "FLAT_50", "FLAT_75")


@dataclass(frozen=True)
class Weights:
    """What a number (alpha, say) is for each tensor. `rules` are (pattern, value): the last that fits a name wins."""

    plain: float
    table: tuple[Block, ...] = ()
    by_label: Mapping[str, float] | None = None
    rules: tuple[tuple[str, float], ...] = ()

    def of(self, name: str, inside: str | None) -> float:
        """The value for the tensor `name`, which in the U-Net is called `inside`; None where it is no part of it."""
        value = self.plain
        if self.by_label is not None:
            value = self.by_label[block_of(inside, self.table) if inside is not None else BASE]
        for pattern, said in self.rules:
            if fnmatchcase(name, pattern) or (inside is not None and fnmatchcase(inside, pattern)):
                value = said
        return value


def weights(plain: float, told: str | None, spec: UNetSpec | None, rules: Sequence[str] = ()) -> Weights:
    """`told` is a preset's name, numbers with commas between (the base first), or a file of either, or of labels.

    A file of labels is TOML: `IN04 = 0.3`, `M00 = 1.0`, `BASE = 0.5`; blocks it does not name have `plain`. `rules`
    are "PATTERN=NUMBER" with `*` and `?`. Raises RequestError or FileError naming what is wrong.
    """
    parsed = tuple(_rule(text) for text in rules)
    if told is None:
        return Weights(plain, rules=parsed)
    if spec is None:
        raise RequestError("blocks", "the models have no U-Net whose blocks could be told apart")
    table = blocks(spec)
    return Weights(plain, table, _labelled(told, table, plain), parsed)


def _labelled(told: str, table: tuple[Block, ...], plain: float) -> dict[str, float]:
    labels = [block.label for block in table]
    if (curve := PRESETS.get(told.upper())) is not None:
        last = len(labels) - 1
        flat = told.upper() in _FLAT
        return {BASE: curve(0.0) if flat else 0.0} | {label: curve(n / last) for n, label in enumerate(labels)}
    if "," in told or not Path(told).is_file():
        return _from_numbers(told, labels)
    path = Path(told)
    text = path.read_text(encoding="utf-8")
    return _from_toml(path, text, labels, plain) if "=" in text else _from_numbers(text, labels)


def _from_numbers(text: str, labels: list[str]) -> dict[str, float]:
    try:
        numbers = [float(part) for part in text.replace("\n", ",").split(",") if part.strip()]
    except ValueError:
        some = ", ".join(list(PRESETS)[:6])
        raise RequestError(
            "blocks", f"{text[:60]!r} is no file, no preset ({some}, ...) and no row of numbers"
        ) from None
    if len(numbers) == len(labels):  # the base is left out now and then
        numbers = [0.0, *numbers]
    if len(numbers) != len(labels) + 1:
        raise RequestError(
            "blocks", f"{len(numbers)} numbers were given; this U-Net has {len(labels)} blocks and a base"
        )
    return dict(zip([BASE, *labels], numbers))


def _from_toml(path: Path, text: str, labels: list[str], plain: float) -> dict[str, float]:
    try:
        said = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FileError(path, f"is not TOML: {error}") from None
    for label, value in said.items():
        if label not in (BASE, *labels) or not isinstance(value, int | float) or isinstance(value, bool):
            raise FileError(
                path, f"says {label} = {value!r}; expected BASE or {labels[0]} to {labels[-1]}, and a number"
            )
    return {label: float(said.get(label, plain)) for label in (BASE, *labels)}


def _rule(text: str) -> tuple[str, float]:
    pattern, sign, value = text.rpartition("=")
    try:
        if not sign or not pattern:
            raise ValueError
        return pattern, float(value)
    except ValueError:
        raise RequestError("rule", f"{text!r} is not of the form PATTERN=NUMBER") from None

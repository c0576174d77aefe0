"""Block weights: one number for each block of the U-Net, as a list of numbers, by label, or as a preset curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from gouache.errors import FileError, RequestError, printable
from gouache.layouts.blocks import Block, block_of, blocks
from gouache.nn.spec import UNetSpec
from gouache.outside import MalformedText, parse_toml, read_text
from gouache.wording import plural

MAX_WEIGHT = 10_000.0
_MOST = 1_000_000  # bytes of a file of weights
BASE = "BASE"  # the label of all tensors outside the U-Net

# Curves over the blocks, x running from 0 (first block) to 1 (last). BASE has the weight 0 in all but the flat presets.
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
    """The value of one setting, such as alpha, for each tensor.

    `plain` applies where neither `by_label` nor a rule does. `rules` are (pattern, value): the last match wins.
    """

    plain: float
    table: tuple[Block, ...] = ()
    by_label: Mapping[str, float] | None = None
    rules: tuple[tuple[str, float], ...] = ()

    def of(self, name: str, inside: str | None) -> float:
        """The value for the tensor `name`; `inside` is its name within the U-Net, None if it is not in the U-Net."""
        value = self.plain
        if self.by_label is not None:
            value = self.by_label[block_of(inside, self.table) if inside is not None else BASE]
        for pattern, override in self.rules:
            if fnmatchcase(name, pattern) or (inside is not None and fnmatchcase(inside, pattern)):
                value = override
        return value


def weights(plain: float, text: str | None, spec: UNetSpec | None, rules: Sequence[str] = ()) -> Weights:
    """The block weights that `text` describes: the name of a preset, numbers separated by commas (BASE first), or the
    path of a file that holds numbers or labels.

    A file of labels is TOML: `IN04 = 0.3`, `M00 = 1.0`, `BASE = 0.5`; blocks it does not name have `plain`. `rules`
    are "PATTERN=NUMBER" with the wildcards `*` and `?`. Raises RequestError or FileError for invalid values.
    """
    parsed = tuple(_rule(rule) for rule in rules)
    if text is None:
        return Weights(plain, rules=parsed)
    if spec is None:
        raise RequestError("blocks", "the models have no U-Net, so there are no blocks to weight")
    table = blocks(spec)
    return Weights(plain, table, _by_label(text, table, plain), parsed)


def _by_label(preset: str, table: tuple[Block, ...], plain: float) -> dict[str, float]:
    labels = [block.label for block in table]
    if (curve := PRESETS.get(preset.upper())) is not None:
        last = len(labels) - 1
        flat = preset.upper() in _FLAT
        return {BASE: curve(0.0) if flat else 0.0} | {label: curve(n / last) for n, label in enumerate(labels)}
    if "," in preset or not _is_path(preset):
        some = ", ".join(list(PRESETS)[:6])
        what = f"{printable(preset, 60)!r} is not a file, a preset ({some}, ...) or numbers separated by commas"
        return _from_numbers(preset, labels, what)
    path = Path(preset)
    text = read_text(path, _MOST)
    if "=" in text:
        return _from_toml(path, text, labels, plain)
    # No part of the file is in the message: a recipe of somebody else may name any file.
    return _from_numbers(text, labels, f"{printable(preset)} has neither numbers nor labels of blocks")


def _is_path(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def _from_numbers(text: str, labels: list[str], otherwise: str) -> dict[str, float]:
    try:
        numbers = [_number(part) for part in text.replace("\n", ",").split(",") if part.strip()]
    except ValueError:
        raise RequestError("blocks", otherwise) from None
    if len(numbers) == len(labels):  # some tools leave the number for BASE out
        numbers = [0.0, *numbers]
    if len(numbers) != len(labels) + 1:
        raise RequestError(
            "blocks",
            f"got {plural(len(numbers), 'number')}; this U-Net needs {len(labels) + 1}: BASE and {len(labels)} blocks",
        )
    return dict(zip([BASE, *labels], numbers))


def _from_toml(path: Path, text: str, labels: list[str], plain: float) -> dict[str, float]:
    try:
        values = parse_toml(text)
    except MalformedText as error:
        raise FileError(path, str(error)) from None
    for label, value in values.items():
        known = label in (BASE, *labels) and isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not abs(value) <= MAX_WEIGHT:
            raise FileError(
                path,
                f"has {printable(f'{label} = {value!r}', 80)}; expected BASE or {labels[0]} to {labels[-1]}, and a "
                f"number up to {MAX_WEIGHT:g}",
            )
    return {label: float(values.get(label, plain)) for label in (BASE, *labels)}


def _rule(text: str) -> tuple[str, float]:
    pattern, sign, value = text.rpartition("=")
    try:
        if not sign or not pattern:
            raise ValueError
        return pattern, _number(value)
    except ValueError:
        raise RequestError("rule", f"{printable(text, 80)!r} is not PATTERN=NUMBER") from None


def _number(text: str) -> float:
    """A finite weight. Raises ValueError."""
    value = float(text)
    if not abs(value) <= MAX_WEIGHT:
        raise ValueError
    return value

"""How strongly an adapter acts: on the U-Net and the text encoders, block by block, and when in a run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gouache.errors import RequestError
from gouache.layouts.blocks import Block, block_of, blocks
from gouache.layouts.modules import Module
from gouache.nn.spec import UNetSpec

MOST = 1e4
BASE = "BASE"  # the label of the text encoders

# The presets of LoRA block weights in common use: a number for the text encoders and each block with a transformer of
# SD1's U-Net, in the order IN01 IN02 IN04 IN05 IN07 IN08, M00, OUT03 to OUT11.
PRESETS: Mapping[str, str] = {
    "NONE": "0 000000 0 000000000",
    "ALL": "1 111111 1 111111111",
    "INS": "1 110000 0 000000000",
    "IND": "1 000111 0 000000000",
    "INALL": "1 111111 0 000000000",
    "MIDD": "1 000111 1 111100000",
    "OUTD": "1 000000 0 111100000",
    "OUTS": "1 000000 0 000011111",
    "OUTALL": "1 000000 0 111111111",
}


@dataclass(frozen=True)
class Strength:
    """`unet`, and `text` for the text encoders (None: as the U-Net); any number, 1 is what the file's author meant.

    `text` may be {"text_encoder": ..., "text_encoder_2": ...}; one that is left out is as the U-Net.

    `blocks`: a factor for each block of the U-Net by label, and BASE for the text encoders. `start` and `end`, shares
    of a run's steps: the U-Net's part acts from the one to the other.
    """

    unet: float = 1.0
    text: float | Mapping[str, float] | None = None
    blocks: Mapping[str, float] | None = None
    start: float = 0.0
    end: float = 1.0
    table: tuple[Block, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        texts = self.text.values() if isinstance(self.text, Mapping) else [self.text or 0.0]
        every = [self.unet, *texts, self.start, self.end, *(self.blocks or {}).values()]
        if not all(math.isfinite(number) and abs(number) <= MOST for number in every):
            raise RequestError("strength", f"a strength is {max(every, key=abs):g}; it takes numbers up to {MOST:g}")

    def of(self, module: Module) -> float:
        """The strength for one module."""
        component, path = module
        if component == "unet":
            factor = self.blocks[block_of(path, self.table)] if self.blocks is not None else 1.0
            return self.unet * factor
        factor = self.blocks.get(BASE, 1.0) if self.blocks is not None else 1.0
        text = self.text.get(component) if isinstance(self.text, Mapping) else self.text
        return (self.unet if text is None else text) * factor

    def to_json(self) -> dict[str, object]:
        """What it takes to make it again; see `from_json`."""
        told = {"unet": self.unet, "text": self.text, "blocks": self.blocks, "start": self.start, "end": self.end}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in told.items()}

    @property
    def whole_run(self) -> bool:
        """Whether it is the same at every step."""
        return self.start <= 0 and self.end >= 1

    def acts(self, progress: float) -> bool:
        """Whether it acts at the step that begins when the share `progress` of the steps is done."""
        return self.start <= progress and (progress < self.end or self.end >= 1)


def strength(
    unet: float = 1.0,
    text: float | Mapping[str, float] | None = None,
    told: str | None = None,
    start: float = 0.0,
    end: float = 1.0,
    spec: UNetSpec | None = None,
) -> Strength:
    """A strength with block weights as people write them; see `block_weights`. Raises RequestError."""
    if told is None:
        return Strength(unet, text, None, start, end)
    if spec is None:
        raise RequestError("lora_blocks", "the model has no U-Net whose blocks could be told apart")
    table = blocks(spec)
    return Strength(unet, text, block_weights(told, table), start, end, table)


def from_json(values: Mapping[str, Any], spec: UNetSpec) -> Strength:
    """The reverse of `Strength.to_json`. Raises RequestError for what is none."""
    try:
        by_block = values.get("blocks")
        table = blocks(spec)
        own = {BASE, *(block.label for block in table)}
        factors = None if by_block is None else {label: float(by_block[label]) for label in own}
        text = values.get("text")
        text = {str(name): float(each) for name, each in text.items()} if isinstance(text, Mapping) else text
        return Strength(
            float(values.get("unet", 1.0)), float(text) if isinstance(text, int | float) else text, factors,
            float(values.get("start", 0.0)), float(values.get("end", 1.0)), table,
        )  # fmt: skip
    except (TypeError, ValueError, LookupError):
        raise RequestError("strength", "what is recorded of it is damaged") from None


def block_weights(told: str, table: Sequence[Block]) -> dict[str, float]:
    """{label: factor} of a preset's name, a row of numbers, or labels with numbers.

    A row has a number for BASE and each block ("1,0.5,..."), or for BASE and each block with a transformer; of the
    latter, as of presets, a block without one takes the number before it. Labels: "BASE=1, IN=0, M00=0.5,
    OUT03-OUT05=0.2"; those not named have 1.
    """
    if (preset := PRESETS.get(told.strip().upper())) is not None:
        return _by_transformers(_preset(preset, table), table)
    if "=" in told:
        return _by_label(told, table)
    try:
        numbers = [float(part) for part in re.split(r"[,\s]+", told.strip())]
    except ValueError:
        raise RequestError(
            "lora_blocks", f"{told[:60]!r} is no preset ({', '.join(PRESETS)}), no row of numbers and no LABEL=NUMBER"
        ) from None
    if len(numbers) == len(table) + 1:
        return dict(zip([BASE, *(block.label for block in table)], numbers))
    listed = _transformers(table)
    if len(numbers) == len(listed) + 1:
        return _by_transformers(numbers, table)
    raise RequestError(
        "lora_blocks",
        f"{len(numbers)} numbers were given; this U-Net takes {len(table) + 1} (BASE and each block) or "
        f"{len(listed) + 1} (BASE and {', '.join(block.label for block in listed)})",
    )


def _transformers(table: Sequence[Block]) -> list[Block]:
    return [block for block in table if "transformer" in block.meaning]


def _preset(text: str, table: Sequence[Block]) -> list[float]:
    """A preset's row for this U-Net, which may have other numbers of blocks than SD1's on each side."""
    base, *sides = text.split()
    listed = _transformers(table)
    row = [float(base)]
    for side, prefix in zip(sides, ("IN", "M", "OUT")):
        count = sum(block.label.startswith(prefix) for block in listed)
        row += [float(side[int((index + 0.5) / count * len(side))]) for index in range(count)]
    return row


def _by_transformers(numbers: Sequence[float], table: Sequence[Block]) -> dict[str, float]:
    base, *rest = numbers
    row = dict(zip((block.label for block in _transformers(table)), rest))
    found, last = {BASE: base}, rest[0]
    for block in table:
        last = found[block.label] = row.get(block.label, last)
    return found


def _by_label(told: str, table: Sequence[Block]) -> dict[str, float]:
    labels = [BASE, *(block.label for block in table)]
    found = dict.fromkeys(labels, 1.0)
    for part in filter(None, re.split(r"[,;\s]+", told.strip())):
        name, _, value = part.partition("=")
        first, _, last = name.upper().replace("MID", "M00").partition("-")
        meant = [label for label in labels if label == first or (label.startswith(first) and first in ("IN", "OUT"))]
        if last:
            both = first in labels and last in labels
            meant = labels[labels.index(first) : labels.index(last) + 1] if both else []
        try:
            number = float(value)
        except ValueError:
            number = None
        if not meant or number is None:
            raise RequestError(
                "lora_blocks", f"{part!r} is not LABEL=NUMBER; labels are BASE, {labels[1]} to {labels[-1]}, IN, OUT"
            )
        found |= dict.fromkeys(meant, number)
    return found

"""The strength of an adapter: for the U-Net and the text encoders, per block, and for a range of a run's steps."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gouache.errors import RequestError
from gouache.layouts.blocks import Block, block_of
from gouache.layouts.blocks import blocks as unet_blocks
from gouache.layouts.modules import Module
from gouache.nn.spec import UNetSpec

MAX_STRENGTH = 1e4
BASE = "BASE"  # the label of the text encoders

# The common presets of LoRA block weights: a number for the text encoders, then one for each block with a transformer
# in SD1's U-Net, in the order IN01 IN02 IN04 IN05 IN07 IN08, M00, OUT03 to OUT11.
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
    """`unet`: the strength for the U-Net. `text`: that for the text encoders; None means the same as `unet`.

    1 is the strength the adapter was trained with; any number up to MAX_STRENGTH is allowed, also negative ones.
    `text` may be {"text_encoder": ..., "text_encoder_2": ...}; an encoder that is missing in it uses `unet`.

    `blocks`: a factor per block of the U-Net by label, and under BASE one for the text encoders. `start` and `end`,
    fractions of the run's steps from 0 to 1, limit the steps in which the U-Net's part is active. `table`: the blocks
    of the U-Net that `blocks` refers to. Raises RequestError for numbers out of range.
    """

    unet: float = 1.0
    text: float | Mapping[str, float] | None = None
    blocks: Mapping[str, float] | None = None
    start: float = 0.0
    end: float = 1.0
    table: tuple[Block, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        texts = self.text.values() if isinstance(self.text, Mapping) else [self.text or 0.0]
        values = [self.unet, *texts, self.start, self.end, *(self.blocks or {}).values()]
        for number in values:
            if not (math.isfinite(number) and abs(number) <= MAX_STRENGTH):
                raise RequestError(
                    "strength", f"{number:g} is out of range; expected -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}"
                )

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
        """The values as JSON types; `from_json` is the inverse."""
        values = {"unet": self.unet, "text": self.text, "blocks": self.blocks, "start": self.start, "end": self.end}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}

    @property
    def whole_run(self) -> bool:
        """Whether the strength is the same at every step."""
        return self.start <= 0 and self.end >= 1

    def acts(self, progress: float) -> bool:
        """Whether the adapter is active at the step that starts at the fraction `progress` of the steps."""
        return self.start <= progress and (progress < self.end or self.end >= 1)


def strength(
    unet: float = 1.0,
    text: float | Mapping[str, float] | None = None,
    blocks: str | None = None,
    start: float = 0.0,
    end: float = 1.0,
    spec: UNetSpec | None = None,
) -> Strength:
    """A Strength whose block weights are given as text; see `block_weights`. Raises RequestError."""
    if blocks is None:
        return Strength(unet, text, None, start, end)
    if spec is None:
        raise RequestError("lora_blocks", "block weights need a model with a U-Net")
    table = unet_blocks(spec)
    return Strength(unet, text, block_weights(blocks, table), start, end, table)


def from_json(values: Mapping[str, Any], spec: UNetSpec) -> Strength:
    """The inverse of `Strength.to_json`. Raises RequestError if `values` is not a valid record."""
    try:
        by_block = values.get("blocks")
        table = unet_blocks(spec)
        labels = [BASE, *(block.label for block in table)]
        factors = None if by_block is None else {label: float(by_block[label]) for label in labels}
        text = values.get("text")
        text = {str(name): float(each) for name, each in text.items()} if isinstance(text, Mapping) else text
        return Strength(
            float(values.get("unet", 1.0)), text if text is None or isinstance(text, Mapping) else float(text), factors,
            float(values.get("start", 0.0)), float(values.get("end", 1.0)), table,
        )  # fmt: skip
    except (TypeError, ValueError, LookupError, OverflowError):
        raise RequestError(
            "strength", "the recorded strength is damaged; expected numbers for unet, text, blocks, start, end"
        ) from None


def block_weights(text: str, table: Sequence[Block]) -> dict[str, float]:
    """{label: factor} from the name of a preset, a row of numbers, or labels with numbers. Raises RequestError.

    A row has one number for BASE and each block ("1,0.5,..."), or for BASE and each block with a transformer. In the
    latter, and in presets, a block without a transformer has the number of the block before it. Labels:
    "BASE=1, IN=0, M00=0.5, OUT03-OUT05=0.2"; labels that are not named have 1.
    """
    if (preset := PRESETS.get(text.strip().upper())) is not None:
        return _by_transformers(_preset(preset, table), table)
    if "=" in text:
        return _by_label(text, table)
    try:
        numbers = [float(part) for part in re.split(r"[,\s]+", text.strip())]
    except ValueError:
        raise RequestError(
            "lora_blocks",
            f"{text[:60]!r} is not recognised; expected a preset ({', '.join(PRESETS)}), numbers, or LABEL=NUMBER",
        ) from None
    if len(numbers) == len(table) + 1:
        return dict(zip([BASE, *(block.label for block in table)], numbers))
    listed = _transformers(table)
    if len(numbers) == len(listed) + 1:
        return _by_transformers(numbers, table)
    raise RequestError(
        "lora_blocks",
        f"{len(numbers)} number{'s were' if len(numbers) != 1 else ' was'} given; this U-Net expects {len(table) + 1} "
        f"(BASE and each block) or "
        f"{len(listed) + 1} (BASE and {', '.join(block.label for block in listed)})",
    )


def _transformers(table: Sequence[Block]) -> list[Block]:
    return [block for block in table if "transformer" in block.meaning]


def _preset(text: str, table: Sequence[Block]) -> list[float]:
    """A preset's row for this U-Net, which may have more or fewer blocks per side than SD1's."""
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
    factors, last = {BASE: base}, rest[0]
    for block in table:
        last = factors[block.label] = row.get(block.label, last)
    return factors


def _by_label(text: str, table: Sequence[Block]) -> dict[str, float]:
    labels = [BASE, *(block.label for block in table)]
    factors = dict.fromkeys(labels, 1.0)
    for part in filter(None, re.split(r"[,;\s]+", text.strip())):
        name, _, value = part.partition("=")
        first, _, last = name.upper().replace("MID", "M00").partition("-")
        selected = [label for label in labels if label == first or (label.startswith(first) and first in ("IN", "OUT"))]
        if last:
            known = first in labels and last in labels
            selected = labels[labels.index(first) : labels.index(last) + 1] if known else []
        try:
            number = float(value)
        except ValueError:
            number = None
        if not selected or number is None:
            raise RequestError(
                "lora_blocks", f"{part!r} is not LABEL=NUMBER; labels are BASE, {labels[1]} to {labels[-1]}, IN, OUT"
            )
        factors |= dict.fromkeys(selected, number)
    return factors

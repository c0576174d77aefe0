"""How a family reads a prompt, as facts: which text encoders, which of their layers, what else is told.

`families` fills these in; `encode` follows them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SizeIds = Literal["sdxl", "refiner"]


@dataclass(frozen=True)
class EncoderRecipe:
    """One text encoder's part in the context.

    `layer` counts hidden states from the end: 1 the last block, 2 the one before (the "clip skip" the family was
    trained with). `final_norm` says whether the encoder's last layer norm follows. `pad_token` fills a chunk after its
    end token; None: more end tokens.
    """

    name: str
    pad_token: int | None = None
    layer: int = 1
    final_norm: bool = True


@dataclass(frozen=True)
class TextRecipe:
    """A family's text conditioning.

    The encoders' hidden states stand side by side in the context, in this order. `pooled` names the encoder whose
    pooled vector opens the extra vector; None: there is no such vector. `size_ids` says which numbers follow it, each
    as a sinusoid `size_width` wide: "sdxl" original size, crop, target size (height before width, top before left);
    "refiner" the aesthetic score in place of the target size. `zero_empty_negative`: the family was trained to drop
    its text by zeroing it, so an empty negative prompt is zeros rather than the encoding of no words.
    """

    encoders: tuple[EncoderRecipe, ...]
    pooled: str | None = None
    size_ids: SizeIds | None = None
    size_width: int = 256
    zero_empty_negative: bool = False

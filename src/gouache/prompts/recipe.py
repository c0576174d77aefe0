"""How a model family encodes a prompt: which text encoders, which of their layers, which further inputs.

`families` provides the values, `encode` uses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SizeIds = Literal["sdxl", "refiner"]


@dataclass(frozen=True)
class EncoderRecipe:
    """One text encoder's part in the context.

    `layer` counts hidden states from the end: 1 the last block's output, 2 that of the block before (the "clip skip"
    that the family was trained with). `final_norm`: the encoder's final layer norm is applied to it. `pad_token`
    fills a chunk after its end token; None: more end tokens.
    """

    name: str
    pad_token: int | None = None
    layer: int = 1
    final_norm: bool = True


@dataclass(frozen=True)
class TextRecipe:
    """A family's text conditioning.

    The encoders' hidden states are concatenated along the width, in this order. `pooled` names the encoder whose
    pooled output is the first part of `Conditioning.vector`; None: there is no vector. `size_ids` selects the numbers
    that follow it, each as a sinusoid of width `size_width`: "sdxl" original size, crop, target size (height before
    width, top before left); "refiner" the aesthetic score instead of the target size. `zero_empty_negative`: the
    family was trained with text dropout to zeros, so an empty negative prompt is zeros, not the encoding of "".
    """

    encoders: tuple[EncoderRecipe, ...]
    pooled: str | None = None
    size_ids: SizeIds | None = None
    size_width: int = 256
    zero_empty_negative: bool = False

"""The conditioner of SD1, SD2 and SDXL: prompts to `Conditioning`, through the text encoders of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from gouache.adapters.embedding import Embeddings
from gouache.diffusion.conditioning import Conditioning
from gouache.nn.clip_text import ClipText
from gouache.prompts.encode import Emphasis, encode
from gouache.prompts.recipe import TextRecipe
from gouache.prompts.tokenizer import Tokenizer

AESTHETIC, AESTHETIC_NEGATIVE = 6.0, 2.5
"""The scores that SDXL's refiner receives by default (Podell et al. 2023)."""


@dataclass(eq=False, repr=False)
class TextConditioner:
    """`embeddings` {name: {encoder: (vectors, D)}} are names that prompts can use beside the vocabulary."""

    encoders: Mapping[str, ClipText]
    recipe: TextRecipe
    tokenizer: Tokenizer
    embeddings: Embeddings = field(default_factory=Embeddings)

    @property
    def widths(self) -> dict[str, int]:
        """The width of a token's vector, by encoder."""
        return {each.name: self.encoders[each.name].spec.width for each in self.recipe.encoders}

    def encode(
        self,
        texts: Sequence[str],
        *,
        size: tuple[int, int],
        device: torch.device,
        negative: bool = False,
        clip_skip: int | None = None,
        emphasis: Emphasis = "original",
        aesthetic: float | None = None,
    ) -> Conditioning:
        """The conditioning of `texts`, one row each; see `prompts.encode`."""
        default = AESTHETIC_NEGATIVE if negative else AESTHETIC
        return encode(
            texts,
            self.tokenizer,
            self.encoders,
            self.recipe,
            clip_skip=clip_skip,
            size=size,
            emphasis=emphasis,
            negative=negative,
            aesthetic=default if aesthetic is None else aesthetic,
            embeddings=self.embeddings,
            device=device,
        )

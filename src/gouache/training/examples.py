"""One picture of a batch: what is needed of it, and what has been read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gouache.data.pictures import View
from gouache.diffusion.conditioning import Conditioning
from gouache.training.batch import Part
from gouache.training.rows import Row


@dataclass(frozen=True)
class Example:
    """One of a batch, before anything is read: how a picture is seen, with which caption.

    `key` is that of its latents in the cache. `hole` is the number of its mask of inpainting, None if there is none,
    and `hole_key` the key of its concat channels.
    """

    row: Row
    view: View
    caption: str
    key: str
    hole: int | None = None
    hole_key: str = ""


@dataclass(frozen=True)
class Needs:
    """What a run needs of the caches: a number of entries and their bytes, of which `missing` are still to be made."""

    latents: int
    texts: int
    latent_bytes: int
    text_bytes: int
    missing_latents: int
    missing_texts: int

    @property
    def bytes(self) -> int:
        return self.latent_bytes + self.text_bytes


@dataclass(frozen=True)
class Loaded:
    """What a thread has read for an example. `picture` is None if the caches have all that is needed of it, or for the
    reason `damage`."""

    latents: dict[str, Tensor] | None
    concat: dict[str, Tensor] | None
    text: Conditioning | None
    picture: tuple[Tensor, Tensor | None] | None
    damage: str = ""


@dataclass(frozen=True)
class Read:
    """The examples of a batch that this process has, and which part of the batch they are if there are others."""

    examples: list[tuple[Example, Loaded]]
    part: Part | None = None

"""Small data sets of pictures for tests of caches and batches, with encoders that count their calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gouache.data.buckets import Buckets
from gouache.data.record import Record
from gouache.diffusion.conditioning import Conditioning
from gouache.training.batches import Batches, Options
from gouache.training.latent_cache import LatentCache
from gouache.training.text_cache import TextCache

BUCKETS = Buckets((64, 64), step=8)
SHAPES = ((64, 64), (96, 64), (100, 66), (64, 96), (128, 40), (40, 128), (41, 131))
"""Seven pictures of five shapes: the second and third, and the last two, get the same size."""


def draw(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    """A picture of random colours in cells of 8 pixels, written to `path`."""
    colors = np.random.default_rng(seed).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
    Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def change_pixel(path: Path) -> None:
    picture = Image.open(path).convert("RGB")
    red, green, blue = picture.getpixel((5, 5))  # type: ignore[misc]
    picture.putpixel((5, 5), (red ^ 1, green, blue))
    picture.save(path)


def data_set(folder: Path, **options: Any) -> list[Record]:
    """A record for each of `SHAPES`."""
    return [
        replace(Record(draw(folder / f"{row}.png", size, row), f"{row}.png", (f"one, two, number {row}",)), **options)
        for row, size in enumerate(SHAPES)
    ]


def plain_caption(record: Record, epoch: int, generator: torch.Generator, number: int) -> str:
    return record.captions[0]


def shuffled_caption(record: Record, epoch: int, generator: torch.Generator, number: int) -> str:
    """The parts in random order, and nothing in a fifth of the cases."""
    parts = record.captions[0].split(", ")
    order = torch.randperm(len(parts), generator=generator).tolist()
    dropped = bool(torch.rand((), generator=generator) < 0.2)
    return "" if dropped else ", ".join(parts[place] for place in order)


@dataclass
class Encoders:
    """Stand-ins for the networks that count what they encode. `chunks` is the number of words per chunk."""

    scale: float = 1.0
    words: int = 4
    pictures: list[Tensor] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def picture(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 4, H / 8, W / 8)."""
        self.pictures += list(images)
        return self.scale * torch.cat([F.avg_pool2d(images, 8), -F.max_pool2d(images[:, :1], 8)], 1)

    def text(self, texts: list[str]) -> Conditioning:
        """A context of a chunk of 77 tokens per `words` words."""
        self.texts += texts
        chunks = max(1, max(-(-len(text.split()) // self.words) for text in texts))
        rows = []
        for text in texts:
            parts = text.split()
            groups = [" ".join(parts[n * self.words : (n + 1) * self.words]) for n in range(chunks)]
            rows.append(torch.cat([_vectors(group) for group in groups]))
        return Conditioning(torch.stack(rows), torch.stack([_vectors(text)[0, :5] for text in texts]))


def _vectors(text: str) -> Tensor:
    return torch.randn(77, 6, generator=torch.Generator().manual_seed(sum(text.encode()) * 31 + len(text)))


def batches(
    records: Sequence[Record],
    folder: Path | None,
    encoders: Encoders | None = None,
    *,
    vae: str = "vae",
    text: str | None = "text",
    caption: Any = plain_caption,
    recipe: Any = None,
    chunks: Any = None,
    **options: Any,
) -> Batches:
    """Batches with the caches in `folder`; without conditioning if `text` is None."""
    encoders = encoders or Encoders()
    latents = LatentCache(folder and folder / "latents", vae, encoders.picture)
    texts = None if text is None else TextCache(folder and folder / "texts", text, encoders.text)
    return Batches(
        records,
        Options(**{"buckets": (BUCKETS,), "batch": 4, "workers": 0, **options}),
        latents,
        texts,
        caption,
        recipe,
        chunks,
    )

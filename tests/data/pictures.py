"""Small pictures and captions in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def photo(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A picture with large shapes, as a photograph has: random colours on a coarse grid, enlarged."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def save(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8), **captions: str) -> Path:
    """A picture, and a file next to it for each caption: `txt="a cat"`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(seed, size).save(path)
    for suffix, text in captions.items():
        path.with_suffix(f".{suffix}").write_text(text, encoding="utf-8")
    return path

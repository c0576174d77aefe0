"""The drawings of the invented character, which several recipes train on."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np

from recipes.drawings import character, write_character


def test_the_character_is_inside_the_frame_and_in_its_caption():
    for seed in range(20):
        picture, caption = character(Random(seed), 128)
        pixels = np.asarray(picture, np.int16)
        violet = np.abs(pixels - (138, 66, 196)).max(2) < 20
        assert "zorblax" in caption and 0.05 < violet.mean() < 0.5
        assert not violet[:8].any() and not violet[-8:].any()


def test_every_drawing_has_its_caption_beside_it(tmp_path: Path):
    drawings = write_character(tmp_path / "pictures", count=3)
    files = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert len(drawings) == 3 and files == ["0.png", "0.txt", "1.png", "1.txt", "2.png", "2.txt"]

"""Colours and distances of pictures whose content is known."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw

from recipes.mini.image_measures import SAME_DISTANCE, background_rgb, distances, thing_colour, thumbnails
from recipes.mini.names import COLOURS


def disc(background: tuple[int, int, int], fill: tuple[int, int, int], x: int = 64, y: int = 64) -> Image.Image:
    picture = Image.new("RGB", (128, 128), background)
    ImageDraw.Draw(picture).ellipse((x - 24, y - 24, x + 24, y + 24), fill=fill)
    return picture


def test_the_colours_of_thing_and_background_are_measured_separately():
    for background in COLOURS:
        for fill in COLOURS:
            picture = disc(background.rgb, fill.rgb)
            assert tuple(background_rgb(picture)) == background.rgb
            assert thing_colour(picture) == (None if fill == background else fill)


def test_distances_are_root_mean_squares_of_pixels_in_0_to_1():
    black, grey, white = (Image.new("RGB", (50, 50), (level,) * 3) for level in (0, 51, 255))

    found = distances(thumbnails([black, grey]), thumbnails([white, black]))

    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [0.8, 0.2]]))
    assert 0.0 < SAME_DISTANCE < 0.2

"""Drawings of an invented character, which no model knows, with captions: the training pictures of several recipes."""

from __future__ import annotations

from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

from recipes.mini.names import COLOURS, Colour

CHARACTER = "zorblax"


def write_character(folder: Path, count: int = 5) -> list[Image.Image]:
    """Write `count` drawings of a zorblax with their captions; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    drawings = [character(Random(seed)) for seed in range(count)]
    for number, (picture, caption) in enumerate(drawings):
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return [picture for picture, _ in drawings]


def character(rng: Random, size: int = 128) -> tuple[Image.Image, str]:
    """A picture of a zorblax on a plain background (violet, round, one-eyed, with two antennae), and its caption."""
    background: Colour = rng.choice([colour for colour in COLOURS if "purple" not in colour.words])
    scale = 4
    width = size * scale
    picture = Image.new("RGB", (width, width), background.rgb)
    draw = ImageDraw.Draw(picture)
    x, y = (width * (0.5 + rng.uniform(-0.06, 0.06)) for _ in range(2))
    r = width * rng.uniform(0.26, 0.34)
    for side in (-1, 1):
        tip = x + side * 0.75 * r, y - 1.35 * r
        draw.line([(x + side * 0.3 * r, y - 0.8 * r), tip], fill=(92, 40, 140), width=int(0.13 * r))
        draw.ellipse([tip[0] - 0.17 * r, tip[1] - 0.17 * r, tip[0] + 0.17 * r, tip[1] + 0.17 * r], fill=(255, 214, 64))
    draw.ellipse([x - r, y - r, x + r, y + r], fill=(138, 66, 196))
    draw.ellipse([x - 0.5 * r, y - 0.6 * r, x + 0.5 * r, y + 0.4 * r], fill=(255, 255, 255))
    draw.ellipse([x - 0.2 * r, y - 0.3 * r, x + 0.2 * r, y + 0.1 * r], fill=(20, 20, 30))
    draw.rounded_rectangle([x - 0.4 * r, y + 0.58 * r, x + 0.4 * r, y + 0.7 * r], 0.06 * r, fill=(60, 20, 90))
    template = rng.choice(["a {c} on a {g} background", "{c}, {g} background", "a picture of a {c} on {g}"])
    reduced = picture.resize((size, size), Image.Resampling.LANCZOS)
    return reduced, template.format(c=CHARACTER, g=background.name)

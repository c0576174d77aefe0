"""Endless captioned pictures by number: sample i of a seed is the same whatever was asked before.

So training resumes anywhere, several workers share a seed without talking, and disjoint seeds (training,
validation, judges) never meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image

from recipes.mini.captions import caption
from recipes.mini.names import COLOURS, Colour, Thing
from recipes.mini.rendering import Glyphs, render
from recipes.mini.scenes import FIRST_STAGE, Distribution, Scene, draw_scene

# Seeds that must not meet. A run may use others; these are what the recipe and its evaluation agree on.
TRAINING_SEED = 1
VALIDATION_SEED = 2
JUDGE_SEED = 4


@dataclass(frozen=True, slots=True)
class Sample:
    scene: Scene
    caption: str


def sample(
    seed: int,
    index: int,
    things: Sequence[Thing],
    distribution: Distribution = FIRST_STAGE,
    colours: Sequence[Colour] = COLOURS,
) -> Sample:
    """Scene and caption number `index` of `seed`; of these alone, and of the things, distribution and colours."""
    # Random hashes a string with SHA-512 whole, so neighbouring numbers share nothing.
    rng = Random(f"gouache mini {seed} {index}")
    scene = draw_scene(rng, things, colours, distribution)
    return Sample(scene, caption(scene, rng, distribution))


def dataset(
    seed: int,
    start: int,
    count: int,
    things: Sequence[Thing],
    glyphs: Glyphs,
    size: int = 128,
    distribution: Distribution = FIRST_STAGE,
) -> Iterator[tuple[Image.Image, str]]:
    """Pictures (RGB, `size` px square) and captions of the samples `start` to `start + count - 1`."""
    for index in range(start, start + count):
        drawn = sample(seed, index, things, distribution)
        yield render(drawn.scene, glyphs, size), drawn.caption

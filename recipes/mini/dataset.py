"""Unlimited captioned pictures by number: sample i of a seed is always the same, whatever was sampled before.

So training resumes at any step, several workers share a seed without coordination, and samples of different seeds
(training, validation, judges) are disjoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image

from recipes.mini.captions import caption
from recipes.mini.names import COLOURS, Colour, Thing
from recipes.mini.rendering import Glyphs, render
from recipes.mini.scenes import UNIFORM, Distribution, Scene, sample_scene

# Seeds that must differ. A run may use others; these are the ones of the recipe and its evaluation.
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
    distribution: Distribution = UNIFORM,
    colours: Sequence[Colour] = COLOURS,
) -> Sample:
    """Scene and caption number `index` of `seed`: a function of the arguments alone."""
    # Random hashes the whole string with SHA-512, so consecutive indices give unrelated generators.
    rng = Random(f"gouache mini {seed} {index}")
    scene = sample_scene(rng, things, colours, distribution)
    return Sample(scene, caption(scene, rng, distribution))


def dataset(
    seed: int,
    start: int,
    count: int,
    things: Sequence[Thing],
    glyphs: Glyphs,
    size: int = 128,
    distribution: Distribution = UNIFORM,
) -> Iterator[tuple[Image.Image, str]]:
    """Pictures (RGB, `size` px square) and captions of the samples `start` to `start + count - 1`."""
    for index in range(start, start + count):
        each = sample(seed, index, things, distribution)
        yield render(each.scene, glyphs, size), each.caption

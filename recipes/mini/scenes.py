"""A scene: one to three things, placed, scaled and rotated, on a plain or gradient background; and how it is sampled.

A scene is plain data. `sample_scene` samples one from a `Distribution` with a given random generator;
`rendering.render` makes its picture, `captions.caption` its caption, `dataset` both.
Lengths are fractions of the frame's side; x runs right, y runs down, both from the top left corner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from recipes.mini.names import COLOURS, Colour, Thing

DIRECTIONS = ("vertical", "horizontal", "diagonal")  # top to bottom, left to right, top left to bottom right


@dataclass(frozen=True, slots=True)
class PlacedThing:
    """A thing in the frame: its centre, the longer side of its glyph before rotation, degrees counter-clockwise.

    `tint` is the colour it is recoloured with; None keeps its usual colours.
    """

    thing: Thing
    x: float
    y: float
    size: float
    angle: float = 0.0
    flip: bool = False
    tint: Colour | None = None


@dataclass(frozen=True, slots=True)
class Background:
    """Plain if `direction` is empty; else a gradient along it from `start` to `end`.

    If `start` and `end` are the same colour, the gradient runs from a darker to a lighter shade of it.
    """

    start: Colour
    end: Colour
    direction: str = ""


@dataclass(frozen=True, slots=True)
class Scene:
    things: tuple[PlacedThing, ...]
    background: Background


@dataclass(frozen=True)
class Distribution:
    """How scenes are sampled. Pairs are (minimum, maximum) of a uniform distribution.

    Everything except medium and large single things is centred on the quarters of the frame, so that a small thing
    looks the same alone and next to another.
    """

    count_weights: tuple[float, float, float] = (0.72, 0.23, 0.05)  # relative, of scenes with one, two, three things
    gradients: float = 0.25  # the share of backgrounds that are not plain
    two_colours: float = 0.4  # of gradients, the share between two named colours
    small: float = 0.2  # of single things; the rest after small and large is of medium size
    large: float = 0.25
    small_size: tuple[float, float] = (0.42, 0.48)
    medium_size: tuple[float, float] = (0.60, 0.72)
    large_size: tuple[float, float] = (0.80, 0.92)
    off_centre: float = 0.7  # of small single things, the share at a named position other than the centre
    jitter: float = 0.015  # the largest distance of a centre from its nominal position, along each axis
    rotated: float = 0.25  # the share of things that are rotated, by at most `max_angle` degrees
    max_angle: float = 12.0
    flipped: float = 0.0  # the share that is mirrored
    tinted: float = 0.15  # the share that is recoloured with a named colour
    common_weight: int = 1  # how many times as often as another each of the first `COMMON` things is sampled


COMMON = 80  # the first things of names.toml: the ones that people ask for first

UNIFORM = Distribution()  # all things equally often; for validation, and for measuring the judges
# For training the text encoder and the U-Net: common things and hard scenes more often.
TRAINING = replace(UNIFORM, count_weights=(0.60, 0.35, 0.05), tinted=0.2, common_weight=6)

QUARTERS = (0.25, 0.5, 0.75)

# Centres and the maximum size of things, for scenes of several things. Captions derive the arrangement from the
# centres.
SIDE_BY_SIDE = (((0.25, 0.5), (0.75, 0.5)), 0.48)
ONE_ABOVE_THE_OTHER = (((0.5, 0.25), (0.5, 0.75)), 0.48)
ONE_OVER_TWO = (((0.5, 0.25), (0.25, 0.75), (0.75, 0.75)), 0.48)
TWO_OVER_ONE = (((0.25, 0.25), (0.75, 0.25), (0.5, 0.75)), 0.48)
ARRANGEMENTS = {
    2: ((SIDE_BY_SIDE, 0.7), (ONE_ABOVE_THE_OTHER, 0.3)),
    3: ((ONE_OVER_TWO, 0.5), (TWO_OVER_ONE, 0.5)),
}


def sample_scene(
    rng: Random,
    things: Sequence[Thing],
    colours: Sequence[Colour] = COLOURS,
    distribution: Distribution = UNIFORM,
) -> Scene:
    """One random scene, sampled with `rng` alone. No thing occurs twice in it."""
    count = rng.choices((1, 2, 3), distribution.count_weights)[0]
    chosen = _sample_things(rng, things, count, distribution.common_weight)
    background = _sample_background(rng, colours, distribution)
    free = [colour for colour in colours if colour not in (background.start, background.end)]
    tints = [rng.choice(free) if free and rng.random() < distribution.tinted else None for _ in chosen]
    if count == 1:
        placed = (_place_single(rng, chosen[0], distribution),)
    else:
        arrangements, weights = zip(*ARRANGEMENTS[count])
        centres, max_size = rng.choices(arrangements, weights)[0]
        placed = tuple(
            _place(rng, thing, centre, rng.uniform(0.9, 1.0) * max_size, distribution)
            for thing, centre in zip(chosen, centres)
        )
    return Scene(tuple(replace(each, tint=tint) for each, tint in zip(placed, tints)), background)


def _sample_things(rng: Random, things: Sequence[Thing], count: int, common_weight: int) -> list[Thing]:
    if common_weight == 1:  # the sampling of earlier versions, so that figures of validation and judges stay comparable
        return rng.sample(things, count)
    weights = [common_weight] * len(things[:COMMON]) + [1] * len(things[COMMON:])
    chosen: list[Thing] = []
    while len(chosen) < count:
        chosen += [thing for thing in rng.choices(things, weights) if thing not in chosen]
    return chosen


def _place_single(rng: Random, thing: Thing, distribution: Distribution) -> PlacedThing:
    d = distribution
    sizes = (d.small_size, d.medium_size, d.large_size)
    size_range = rng.choices(sizes, (d.small, 1 - d.small - d.large, d.large))[0]
    size = rng.uniform(*size_range)
    centre = (0.5, 0.5)
    if size_range == d.small_size and rng.random() < d.off_centre:
        centre = rng.choice([(x, y) for x in QUARTERS for y in QUARTERS if (x, y) != (0.5, 0.5)])
    return _place(rng, thing, centre, size, d)


def _place(
    rng: Random, thing: Thing, centre: tuple[float, float], size: float, distribution: Distribution
) -> PlacedThing:
    jitter, max_angle = distribution.jitter, distribution.max_angle
    x, y = (at + rng.uniform(-jitter, jitter) for at in centre)
    angle = rng.uniform(-max_angle, max_angle) if rng.random() < distribution.rotated else 0.0
    return PlacedThing(thing, x, y, size, angle, rng.random() < distribution.flipped)


def _sample_background(rng: Random, colours: Sequence[Colour], distribution: Distribution) -> Background:
    start = rng.choice(colours)
    if rng.random() >= distribution.gradients:
        return Background(start, start)
    end = start
    if rng.random() < distribution.two_colours:
        end = rng.choice([colour for colour in colours if colour != start])
    return Background(start, end, rng.choice(DIRECTIONS))


def without_jitter(scene: Scene, distribution: Distribution = UNIFORM) -> Scene:
    """The scene without what captions never state: things upright, exactly centred, in the mean size of their class."""
    ranges = (distribution.small_size, distribution.medium_size, distribution.large_size)
    means = [(least + most) / 2 for least, most in ranges]

    def nominal(placed: PlacedThing) -> PlacedThing:
        x, y = (min(QUARTERS, key=lambda quarter: abs(quarter - at)) for at in (placed.x, placed.y))
        size = min(means, key=lambda mean: abs(mean - placed.size))
        return replace(placed, x=x, y=y, size=size, angle=0.0, flip=False)

    return replace(scene, things=tuple(nominal(placed) for placed in scene.things))


def size_word(scene: Scene, distribution: Distribution = UNIFORM) -> str:
    """The size that captions may state: "small", "large", or "" (medium, or one of several things)."""
    if len(scene.things) != 1:
        return ""
    size = scene.things[0].size
    if size <= distribution.small_size[1]:
        return "small"
    return "large" if size >= distribution.large_size[0] else ""


def region_of(placed: PlacedThing) -> str:
    """The ninth of the frame that contains the centre: "top left", "left", "centre", "bottom right", ..."""
    column = ("left", "", "right")[(placed.x > 0.4) + (placed.x > 0.6)]
    row = ("top", "", "bottom")[(placed.y > 0.4) + (placed.y > 0.6)]
    return f"{row} {column}".strip() or "centre"

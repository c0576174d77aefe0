"""A scene: one to three things, placed, scaled and turned, on a plain or graded background; how it is drawn by lot.

A scene is plain data. `draw_scene` draws one from a `Distribution` with the random generator it is given;
`rendering.render` makes its picture, `captions.caption` its words, `dataset` both together.
Lengths are fractions of the frame's side; x runs right, y runs down, both from the top left corner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from recipes.mini.names import COLOURS, Colour, Thing

DIRECTIONS = ("vertical", "horizontal", "diagonal")  # top to bottom, left to right, top left to bottom right


@dataclass(frozen=True, slots=True)
class Placed:
    """A thing in the frame: its centre, the longer side of its glyph before turning, degrees counter-clockwise.

    `tint` is the colour it is painted over with, None for its own.
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
    """Plain where `direction` is empty; else it runs along it from `start` to `end`.

    With `start` and `end` the same colour it runs from a darker to a lighter shade of that colour.
    """

    start: Colour
    end: Colour
    direction: str = ""


@dataclass(frozen=True, slots=True)
class Scene:
    things: tuple[Placed, ...]
    background: Background


@dataclass(frozen=True)
class Distribution:
    """How scenes are drawn. Shares are relative weights; pairs are (least, most) of a uniform draw.

    What is not of middle size in the centre lies on quarters of the frame, so that a small thing looks the same alone
    and beside another.
    """

    counts: tuple[float, float, float] = (0.72, 0.23, 0.05)  # scenes of one, two, three things
    graded: float = 0.25  # the share of backgrounds that are not plain
    two_colours: float = 0.4  # of the graded ones, those between two named colours
    small: float = 0.2  # of single things; the rest after small and large is of middle size
    large: float = 0.25
    small_size: tuple[float, float] = (0.42, 0.48)
    middle_size: tuple[float, float] = (0.60, 0.72)
    large_size: tuple[float, float] = (0.80, 0.92)
    placed: float = 0.7  # of small single things, those at a named place away from the centre
    shift: float = 0.015  # how far a centre strays from its place, either way
    turned: float = 0.25  # the share of things that are turned, by at most `turn` degrees
    turn: float = 12.0
    flipped: float = 0.0  # the share that is mirrored
    tinted: float = 0.15  # the share that is painted over with a named colour
    often: int = 1  # how many times as often as another each of the first `COMMON` things is drawn


COMMON = 80  # things that stand first in names.toml, because they are what people ask for first

FIRST_STAGE = Distribution()
# What the text tower and the U-Net are taught: what is hard, and what is asked for first, oftener. They are validated,
# and the judges measured, on all things alike.
TAUGHT = replace(FIRST_STAGE, counts=(0.60, 0.35, 0.05), tinted=0.2, often=6)

QUARTERS = (0.25, 0.5, 0.75)

# Centres and the most a thing may measure there, for scenes of several things. Captions read the arrangement
# back from the centres, so a slot's place is what the words say.
SIDE_BY_SIDE = (((0.25, 0.5), (0.75, 0.5)), 0.48)
ONE_ABOVE_THE_OTHER = (((0.5, 0.25), (0.5, 0.75)), 0.48)
ONE_OVER_TWO = (((0.5, 0.25), (0.25, 0.75), (0.75, 0.75)), 0.48)
TWO_OVER_ONE = (((0.25, 0.25), (0.75, 0.25), (0.5, 0.75)), 0.48)
ARRANGEMENTS = {
    2: ((SIDE_BY_SIDE, 0.7), (ONE_ABOVE_THE_OTHER, 0.3)),
    3: ((ONE_OVER_TWO, 0.5), (TWO_OVER_ONE, 0.5)),
}


def draw_scene(
    rng: Random,
    things: Sequence[Thing],
    colours: Sequence[Colour] = COLOURS,
    distribution: Distribution = FIRST_STAGE,
) -> Scene:
    """One scene by lot; all its chance comes from `rng`. No thing occurs twice in it."""
    count = rng.choices((1, 2, 3), distribution.counts)[0]
    chosen = _draw_things(rng, things, count, distribution.often)
    background = _draw_background(rng, colours, distribution)
    free = [colour for colour in colours if colour not in (background.start, background.end)]
    tints = [rng.choice(free) if free and rng.random() < distribution.tinted else None for _ in chosen]
    if count == 1:
        placed = (_draw_single(rng, chosen[0], distribution),)
    else:
        arrangements, weights = zip(*ARRANGEMENTS[count])
        centres, most = rng.choices(arrangements, weights)[0]
        placed = tuple(
            _draw_placed(rng, thing, centre, rng.uniform(0.9, 1.0) * most, distribution)
            for thing, centre in zip(chosen, centres)
        )
    return Scene(tuple(replace(each, tint=tint) for each, tint in zip(placed, tints)), background)


def _draw_things(rng: Random, things: Sequence[Thing], count: int, often: int) -> list[Thing]:
    if often == 1:  # as scenes for validation and judges always were, so that their figures stay comparable
        return rng.sample(things, count)
    weights = [often] * len(things[:COMMON]) + [1] * len(things[COMMON:])
    chosen: list[Thing] = []
    while len(chosen) < count:
        chosen += [thing for thing in rng.choices(things, weights) if thing not in chosen]
    return chosen


def _draw_single(rng: Random, thing: Thing, distribution: Distribution) -> Placed:
    d = distribution
    sizes = (d.small_size, d.middle_size, d.large_size)
    size_range = rng.choices(sizes, (d.small, 1 - d.small - d.large, d.large))[0]
    size = rng.uniform(*size_range)
    centre = (0.5, 0.5)
    if size_range == d.small_size and rng.random() < d.placed:
        centre = rng.choice([(x, y) for x in QUARTERS for y in QUARTERS if (x, y) != (0.5, 0.5)])
    return _draw_placed(rng, thing, centre, size, d)


def _draw_placed(
    rng: Random, thing: Thing, centre: tuple[float, float], size: float, distribution: Distribution
) -> Placed:
    shift, turn = distribution.shift, distribution.turn
    x, y = (place + rng.uniform(-shift, shift) for place in centre)
    angle = rng.uniform(-turn, turn) if rng.random() < distribution.turned else 0.0
    return Placed(thing, x, y, size, angle, rng.random() < distribution.flipped)


def _draw_background(rng: Random, colours: Sequence[Colour], distribution: Distribution) -> Background:
    start = rng.choice(colours)
    if rng.random() >= distribution.graded:
        return Background(start, start)
    end = start
    if rng.random() < distribution.two_colours:
        end = rng.choice([colour for colour in colours if colour != start])
    return Background(start, end, rng.choice(DIRECTIONS))


def settled(scene: Scene, distribution: Distribution = FIRST_STAGE) -> Scene:
    """The scene without what no caption tells: things upright, just at their places, in the mean size of their kind."""
    sizes = (distribution.small_size, distribution.middle_size, distribution.large_size)
    means = [(least + most) / 2 for least, most in sizes]

    def calm(placed: Placed) -> Placed:
        x, y = (min(QUARTERS, key=lambda quarter: abs(quarter - at)) for at in (placed.x, placed.y))
        size = min(means, key=lambda mean: abs(mean - placed.size))
        return replace(placed, x=x, y=y, size=size, angle=0.0, flip=False)

    return replace(scene, things=tuple(calm(placed) for placed in scene.things))


def size_word(scene: Scene, distribution: Distribution = FIRST_STAGE) -> str:
    """What captions may say of the size: "small", "large", or nothing (of middle size, or one of several)."""
    if len(scene.things) != 1:
        return ""
    size = scene.things[0].size
    if size <= distribution.small_size[1]:
        return "small"
    return "large" if size >= distribution.large_size[0] else ""


def place_of(placed: Placed) -> str:
    """The ninth of the frame that the centre lies in: "top left", "left", "centre", "bottom right", ..."""
    column = ("left", "", "right")[(placed.x > 0.4) + (placed.x > 0.6)]
    row = ("top", "", "bottom")[(placed.y > 0.4) + (placed.y > 0.6)]
    return f"{row} {column}".strip() or "centre"

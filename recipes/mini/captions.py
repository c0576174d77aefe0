"""Captions of scenes: one of many natural phrasings of what a scene contains, and of nothing else.

A caption may omit the background, the size, the position or the thing's usual colour. A colour word before the noun is
the thing's; the background's colour is always next to the word "background", "gradient" or "backdrop", follows "on",
"against" or "in front of", or is next to "behind".
"""

from __future__ import annotations

from random import Random

from recipes.mini.names import Colour
from recipes.mini.scenes import UNIFORM, Background, Distribution, PlacedThing, Scene, region_of, size_word

SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
OPENINGS = ("a picture of ", "picture of ", "an image of ", "a drawing of ", "an illustration of ", "an icon of ")


def caption(scene: Scene, rng: Random, distribution: Distribution = UNIFORM) -> str:
    """A random caption of `scene`, sampled with `rng` alone. Lower case, no full stop."""
    if rng.random() < 0.12:
        return _tags(scene, rng, distribution)
    if len(scene.things) == 1:
        subject = _one_thing(scene, rng, distribution)
    elif len(scene.things) == 2:
        subject = _two_things(scene, rng)
    else:
        subject = _three_things(scene, rng)
    opening = rng.choice(OPENINGS) if rng.random() < 0.25 else ""
    if rng.random() < 0.2:
        return opening + subject
    return _with_background(opening, subject, scene.background, rng)


def phrase(placed: PlacedThing, rng: Random, size: str = "", article: bool = True) -> str:
    """A noun phrase for the thing, as in "a small red apple": its usual colour at times, its tint always."""
    thing = placed.thing
    words = [rng.choice(thing.synonyms) if thing.synonyms and rng.random() < 0.25 else thing.name]
    if placed.tint is not None:
        words.insert(0, _colour_word(placed.tint, rng))
    elif thing.colour and rng.random() < 0.3:
        words.insert(0, thing.colour)
    if size:
        words.insert(0, rng.choice(SIZE_WORDS[size]))
    if article:
        usual = "an" if words[0][0] in "aeiou" else "a"
        # "the sun", but "a small sun": a thing with an adjective is one of several.
        words.insert(0, usual if thing.article == "the" and len(words) > 1 else thing.article or usual)
    return " ".join(words)


def _one_thing(scene: Scene, rng: Random, distribution: Distribution) -> str:
    placed = scene.things[0]
    size = size_word(scene, distribution) if rng.random() < 0.9 else ""
    subject = phrase(placed, rng, size)
    region = region_of(placed)
    if rng.random() < (0.06 if region == "centre" else 0.95):
        subject += " " + rng.choice(_region_phrases(region))
    return subject


def _region_phrases(region: str) -> tuple[str, ...]:
    if region == "centre":
        return ("in the centre", "in the center", "in the middle")
    if " " in region:
        return (f"in the {region}", f"at the {region}", f"in the {region} corner")
    if region in ("top", "bottom"):
        return (f"at the {region}", f"near the {region}")
    return (f"on the {region}", f"at the {region}", f"on the {region} side")


def _two_things(scene: Scene, rng: Random) -> str:
    first, second = (phrase(placed, rng) for placed in scene.things)
    beside = region_of(scene.things[0]) == "left"
    # Without words for sides, the first thing named is the one on the left.
    if beside and rng.random() < 0.5:
        return rng.choice(tuple(f"{first} {link} {second}" for link in ("and", "next to", "beside", "together with")))
    if beside:
        ways = (
            f"{first} to the left of {second}",
            f"{second} to the right of {first}",
            f"{first} on the left and {second} on the right",
            f"{first} left of {second}",
            f"{second} on the right, {first} on the left",
        )
    else:
        ways = (
            f"{first} above {second}",
            f"{first} over {second}",
            f"{second} below {first}",
            f"{first} at the top and {second} at the bottom",
            f"{second} under {first}",
        )
    return rng.choice(ways)


def _three_things(scene: Scene, rng: Random) -> str:
    names = [phrase(placed, rng) for placed in scene.things]
    if rng.random() < 0.6:
        if region_of(scene.things[0]) == "top":
            return rng.choice(("{} above {} and {}", "{} over {} and {}")).format(*names)
        return rng.choice(("{} and {} above {}", "{} and {} over {}")).format(*names)
    return "{}, {} and {}".format(*names)


def _with_background(opening: str, subject: str, background: Background, rng: Random) -> str:
    backdrop = _background_phrase(background, rng)
    article = "an" if backdrop[0] in "aeiou" else "a"
    ways = [
        f"{opening}{subject} on {article} {backdrop}",
        f"{opening}{subject} on {article} {backdrop}",
        f"{opening}{subject}, {backdrop}",
        f"{opening}{subject} against {article} {backdrop}",
        f"{opening}{subject} in front of {article} {backdrop}",
        f"{opening}{subject} with {article} {backdrop}",
        f"{backdrop} with {subject}",
        f"{article} {backdrop} and {subject}",
    ]
    if not background.direction:
        word = _colour_word(background.start, rng)
        ways += [
            f"{opening}{subject} on {word}",
            f"{opening}{subject} against {word}",
            f"{opening}{subject} in front of {word}",
            f"{opening}{subject} with {word} behind it",
            f"{word} behind {subject}",
        ]
    return rng.choice(ways)


def _background_phrase(background: Background, rng: Random) -> str:
    """The background without an article: "blue background", "red to yellow gradient"."""
    start, end = _colour_word(background.start, rng), _colour_word(background.end, rng)
    noun = rng.choice(("background", "background", "background", "backdrop"))
    if not background.direction:
        return rng.choice((f"{start} {noun}", f"{start} {noun}", f"plain {start} {noun}"))
    if background.start == background.end:
        return rng.choice((f"{start} {noun}", f"{start} gradient", f"graded {start} {noun}"))
    return rng.choice(
        (
            f"{start} to {end} gradient",
            f"{start} and {end} {noun}",
            f"{noun} fading from {start} to {end}",
            f"{noun} that goes from {start} to {end}",
        )
    )


def _colour_word(colour: Colour, rng: Random) -> str:
    return rng.choice(colour.words[1:]) if len(colour.words) > 1 and rng.random() < 0.25 else colour.name


def _tags(scene: Scene, rng: Random, distribution: Distribution) -> str:
    tags = [phrase(placed, rng, article=False) for placed in scene.things]
    size = size_word(scene, distribution)
    if size and rng.random() < 0.9:
        tags.append(size)
    if len(scene.things) == 1 and region_of(scene.things[0]) != "centre" and rng.random() < 0.95:
        tags.append(region_of(scene.things[0]))
    if rng.random() < 0.85:
        tags.append(_background_phrase(scene.background, rng))
    return ", ".join(tags)

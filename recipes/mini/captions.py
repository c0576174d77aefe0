"""Scene to words: one of many natural ways of saying what is there, never anything that is not.

A caption may leave out the background, the size, the place or the thing's own colour. A colour word before the
noun is the thing's; the background's colour always stands beside the word "background", "gradient" or "backdrop",
after "on", "against" or "in front of", or beside "behind".
"""

from __future__ import annotations

from random import Random

from recipes.mini.names import Colour
from recipes.mini.scenes import FIRST_STAGE, Background, Distribution, Placed, Scene, place_of, size_word

SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
OPENINGS = ("a picture of ", "picture of ", "an image of ", "a drawing of ", "an illustration of ", "an icon of ")


def caption(scene: Scene, rng: Random, distribution: Distribution = FIRST_STAGE) -> str:
    """One way to say `scene`; all chance comes from `rng`. Lower case, no full stop."""
    if rng.random() < 0.12:
        return _tags(scene, rng, distribution)
    if len(scene.things) == 1:
        subject = _single(scene, rng, distribution)
    elif len(scene.things) == 2:
        subject = _two(scene, rng)
    else:
        subject = _three(scene, rng)
    opening = rng.choice(OPENINGS) if rng.random() < 0.25 else ""
    if rng.random() < 0.2:
        return opening + subject
    return _with_background(opening, subject, scene.background, rng)


def phrase(placed: Placed, rng: Random, size: str = "", article: bool = True) -> str:
    """The thing by one of its words, as in "a small red apple"; its own colour is said now and then, a tint always."""
    thing = placed.thing
    words = [rng.choice(thing.also) if thing.also and rng.random() < 0.25 else thing.name]
    if placed.tint is not None:
        words.insert(0, _word(placed.tint, rng))
    elif thing.colour and rng.random() < 0.3:
        words.insert(0, thing.colour)
    if size:
        words.insert(0, rng.choice(SIZE_WORDS[size]))
    if article:
        usual = "an" if words[0][0] in "aeiou" else "a"
        # There is one sun, but a small one is one of many.
        words.insert(0, usual if thing.article == "the" and len(words) > 1 else thing.article or usual)
    return " ".join(words)


def _single(scene: Scene, rng: Random, distribution: Distribution) -> str:
    placed = scene.things[0]
    size = size_word(scene, distribution) if rng.random() < 0.9 else ""
    subject = phrase(placed, rng, size)
    place = place_of(placed)
    if rng.random() < (0.06 if place == "centre" else 0.95):
        subject += " " + rng.choice(_place_phrases(place))
    return subject


def _place_phrases(place: str) -> tuple[str, ...]:
    if place == "centre":
        return ("in the centre", "in the center", "in the middle")
    if " " in place:
        return (f"in the {place}", f"at the {place}", f"in the {place} corner")
    if place in ("top", "bottom"):
        return (f"at the {place}", f"near the {place}")
    return (f"on the {place}", f"at the {place}", f"on the {place} side")


def _two(scene: Scene, rng: Random) -> str:
    first, second = (phrase(placed, rng) for placed in scene.things)
    beside = place_of(scene.things[0]) == "left"
    # Where no words tell sides, things stand as they are read.
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


def _three(scene: Scene, rng: Random) -> str:
    names = [phrase(placed, rng) for placed in scene.things]
    if rng.random() < 0.6:
        if place_of(scene.things[0]) == "top":
            return rng.choice(("{} above {} and {}", "{} over {} and {}")).format(*names)
        return rng.choice(("{} and {} above {}", "{} and {} over {}")).format(*names)
    return "{}, {} and {}".format(*names)


def _with_background(opening: str, subject: str, background: Background, rng: Random) -> str:
    ground = _ground(background, rng)
    article = "an" if ground[0] in "aeiou" else "a"
    ways = [
        f"{opening}{subject} on {article} {ground}",
        f"{opening}{subject} on {article} {ground}",
        f"{opening}{subject}, {ground}",
        f"{opening}{subject} against {article} {ground}",
        f"{opening}{subject} in front of {article} {ground}",
        f"{opening}{subject} with {article} {ground}",
        f"{ground} with {subject}",
        f"{article} {ground} and {subject}",
    ]
    if not background.direction:
        word = _word(background.start, rng)
        ways += [
            f"{opening}{subject} on {word}",
            f"{opening}{subject} against {word}",
            f"{opening}{subject} in front of {word}",
            f"{opening}{subject} with {word} behind it",
            f"{word} behind {subject}",
        ]
    return rng.choice(ways)


def _ground(background: Background, rng: Random) -> str:
    """The background without an article: "blue background", "red to yellow gradient"."""
    start, end = _word(background.start, rng), _word(background.end, rng)
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


def _word(colour: Colour, rng: Random) -> str:
    return rng.choice(colour.words[1:]) if len(colour.words) > 1 and rng.random() < 0.25 else colour.name


def _tags(scene: Scene, rng: Random, distribution: Distribution) -> str:
    tags = [phrase(placed, rng, article=False) for placed in scene.things]
    size = size_word(scene, distribution)
    if size and rng.random() < 0.9:
        tags.append(size)
    if len(scene.things) == 1 and place_of(scene.things[0]) != "centre" and rng.random() < 0.95:
        tags.append(place_of(scene.things[0]))
    if rng.random() < 0.85:
        tags.append(_ground(scene.background, rng))
    return ", ".join(tags)

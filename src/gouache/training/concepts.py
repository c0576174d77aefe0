"""Files of prompts for training without pictures: concepts that are erased or enhanced, and sliders between two.

Three forms are read, as YAML, TOML or JSON. LECO's (github.com/p1atdev/LECO) is a list of concepts:

    - target: "van gogh"        # the prompt whose prediction is changed
      positive: "van gogh"      # what it is moved away from (erase) or towards (enhance); default: target
      unconditional: ""         # what the direction is measured from
      neutral: ""               # where it starts; default: unconditional
      action: erase
      guidance_scale: 1.0

Kohya's scripts (docs/train_leco.md) write it as `[[prompts]]`, with defaults at the top. Sliders are `targets` with
`target_class`, `positive` and `negative`; each becomes the concepts of `slider`, with both signs of the strength.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from gouache.errors import FileError, RequestError, printable
from gouache.layouts.nearest import nearest
from gouache.outside import MalformedText, parse_json, parse_toml, parse_yaml, read_text

Action = Literal["erase", "enhance"]
Size = tuple[int, int]
FACTOR = 8  # pixels per latent
SUFFIXES = (".yaml", ".yml", ".toml", ".json")
MOST = 1000  # concepts of a file; each has up to four prompts, which are encoded at the start
_MOST_PIXELS, _MOST_ROWS = 8192, 1024


@dataclass(frozen=True)
class Concept:
    """At strength `multiplier` of the adapter, the prediction for `target` becomes that of the model without it for

        neutral - guidance * (positive - unconditional)    to erase, or with + to enhance `positive`.

    The loss has the factor `weight`. `size` (width, height) in pixels, None: the model's; `dynamic` varies it between
    half and all of it. `crops`: SDXL receives random positions in larger pictures. `batch` is the number of latents of
    a step, None: the run's. Raises RequestError for values out of range.
    """

    target: str
    positive: str
    unconditional: str = ""
    neutral: str = ""
    action: Action = "erase"
    guidance: float = 1.0
    size: Size | None = None
    dynamic: bool = False
    crops: bool = False
    batch: int | None = None
    multiplier: float = 1.0
    weight: float = 1.0

    @property
    def prompts(self) -> tuple[str, str, str, str]:
        return self.target, self.positive, self.unconditional, self.neutral


def slider(target: str, positive: str, negative: str, *, multiplier: float = 1.0, **others: Any) -> list[Concept]:
    """The concepts of a slider, as kohya's scripts expand one: `target` moves towards `positive` at `multiplier` and
    towards `negative` at its opposite. One of the two prompts may be empty.

    With both, each direction is there twice: with the one prompt and with the other as the `unconditional` one, from
    which guidance moves away where latents are denoised.
    """
    signs: list[tuple[str, str, Action, float]]
    if positive and negative:
        signs = [
            (negative, positive, "erase", multiplier),
            (positive, negative, "enhance", multiplier),
            (positive, negative, "erase", -multiplier),
            (negative, positive, "enhance", -multiplier),
        ]
    elif positive:
        signs = [(positive, "", "enhance", multiplier), (positive, "", "erase", -multiplier)]
    else:
        signs = [(negative, "", "erase", multiplier), (negative, "", "enhance", -multiplier)]
    return [
        Concept(target, toward, away, action=action, multiplier=strength, **others)
        for toward, away, action, strength in signs
    ]


def identity(concepts: Sequence[Concept]) -> str:
    """A hash of all that is in them."""
    return hashlib.sha256(json.dumps([asdict(each) for each in concepts]).encode()).hexdigest()[:40]


def read(path: Path) -> list[Concept]:
    """The concepts of a file. Raises FileError, or RequestError that names the item and the key."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise FileError(path, f"is not a file of prompts: expected {', '.join(SUFFIXES)}")
    parse = {".toml": parse_toml, ".json": parse_json}.get(suffix, parse_yaml)
    text = read_text(path)
    try:
        values = parse(text)
    except MalformedText as error:
        raise FileError(path, str(error)) from None
    reader = _Reader(path)
    concepts = reader.concepts(values)
    if not concepts:
        raise FileError(path, "has no prompts; expected a list of concepts with target, or targets with target_class")
    if len(concepts) > MOST:
        raise FileError(path, f"has {len(concepts)} concepts, expected at most {MOST}; use fewer targets or neutrals")
    return concepts


_SHARED = ("guidance_scale", "resolution", "dynamic_resolution", "batch_size", "dynamic_crops", "multiplier", "weight")
_CONCEPT = ("target", "positive", "unconditional", "neutral", "action", *_SHARED)
_NEUTRALS = ("neutral", "neutrals", "neutral_prompt_file", "prompt_file")
_SLIDER = ("target_class", "positive", "negative", "resolutions", *_NEUTRALS, *_SHARED)


class _Reader:
    """Reads the items of one file, `where` their messages begin with it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def concepts(self, values: Any) -> list[Concept]:
        if isinstance(values, list):
            return [each for number, item in enumerate(values, 1) for each in self._item(item, {}, f"prompts {number}")]
        top = self._table({} if values is None else values, "the file")
        if "prompts_file" in top:
            file = _shown(top["prompts_file"])
            raise self._error("prompts_file", f"is {file}: this is LECO's configuration; expected that file of prompts")
        if "prompts" not in top and "slider" in top:
            self._check(top, ("slider",), "the file")
            top = self._table(top["slider"], "slider")
        name = next((each for each in ("prompts", "targets") if each in top), "")
        if not name:
            single = "target" in top or "target_class" in top
            return self._item(top, {}, "the file") if single else []
        items = top[name]
        if not isinstance(items, list):
            raise self._error(name, f"is {_shown(items)}; expected a list of tables")
        defaults = {key: value for key, value in top.items() if key != name}
        self._check(defaults, (*_CONCEPT, *_SLIDER), "the file")
        return [each for number, item in enumerate(items, 1) for each in self._item(item, defaults, f"{name} {number}")]

    def _item(self, item: Any, defaults: Mapping[str, Any], where: str) -> list[Concept]:
        item = self._table(item, where)
        is_slider = "target_class" in item
        if not is_slider and "target" not in item:
            raise self._error(where, "has neither target (a concept) nor target_class (a slider)")
        known = _SLIDER if is_slider else _CONCEPT
        self._check(item, known, where)
        if any(name in item for name in _NEUTRALS):  # those of the item replace the common ones of any form
            defaults = {key: value for key, value in defaults.items() if key not in _NEUTRALS}
        merged = {key: value for key, value in {**defaults, **item}.items() if key in known and value is not None}
        values = _Values(self.path, where, merged)
        return self._slider(values) if is_slider else [self._concept(values)]

    def _concept(self, values: _Values) -> Concept:
        target, unconditional = values.text("target"), values.text("unconditional", "")
        action = values.text("action", "erase")
        if action not in get_args(Action):
            raise values.error("action", f"{_shown(action)} is not known; use {' or '.join(get_args(Action))}")
        return Concept(
            target,
            values.text("positive", target),
            unconditional,
            values.text("neutral", unconditional),
            action,  # type: ignore[arg-type]
            size=values.size("resolution"),
            multiplier=values.strength(),
            **values.shared(),
        )

    def _slider(self, values: _Values) -> list[Concept]:
        positive, negative = (values.text(name, "").strip() for name in ("positive", "negative"))
        if not positive and not negative:
            raise values.error("positive", "and negative are both missing; a slider needs at least one of them")
        target, multiplier, shared = values.text("target_class"), values.strength(), values.shared()
        return [
            concept
            for neutral in self._neutrals(values)
            for size in values.sizes()
            for concept in slider(
                target, positive, negative, neutral=neutral, size=size, multiplier=multiplier, **shared
            )
        ]

    def _neutrals(self, values: _Values) -> list[str]:
        found = values.texts("neutrals")
        for name in ("neutral_prompt_file", "prompt_file"):
            if name in values.values:
                lines = read_text(self.path.parent / values.text(name)).splitlines()
                found += [line.strip() for line in lines if line.strip()]
        return found or [values.text("neutral", "")]

    def _table(self, value: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self._error(where, f"is {_shown(value)}; expected a table of prompts")
        return value

    def _check(self, item: Mapping[str, Any], known: Sequence[str], where: str) -> None:
        for key in item:
            if key not in known:
                near = nearest(str(key), known)
                hint = f"; did you mean {near}?" if near else f"; known are {', '.join(dict.fromkeys(known))}"
                raise self._error(where, f"has the unknown key {_shown(key)}{hint}")

    def _error(self, where: str, problem: str) -> RequestError:
        return RequestError(f"{printable(self.path.name)}, {where}", problem)


@dataclass(frozen=True)
class _Values:
    """The keys of one item, checked as they are read."""

    path: Path
    where: str
    values: Mapping[str, Any]

    def text(self, name: str, usual: str | None = None) -> str:
        value = self.values.get(name, usual)
        if not isinstance(value, str):
            raise self.error(name, f"is {_shown(value)}; expected text in quotes")
        return value

    def texts(self, name: str) -> list[str]:
        value = self.values.get(name, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.error(name, f"is {_shown(value)}; expected a list of texts")
        return list(value)

    def number(self, name: str, usual: float, low: float, high: float) -> float:
        value = self.values.get(name, usual)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(name, f"is {_shown(value)}; expected a number")
        if not low <= value <= high:
            raise self.error(name, f"is {value:g}; expected {low:g} to {high:g}")
        return float(value)

    def strength(self) -> float:
        if not (value := self.number("multiplier", 1.0, -100, 100)):
            raise self.error("multiplier", "is 0, at which the adapter has no effect; use another number")
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            raise self.error(name, f"is {_shown(value)}; expected true or false")
        return value

    def shared(self) -> dict[str, Any]:
        batch = self.values.get("batch_size")
        if batch is not None and (type(batch) is not int or not 1 <= batch <= _MOST_ROWS):
            raise self.error("batch_size", f"is {_shown(batch)}; expected a whole number from 1 to {_MOST_ROWS}")
        return {
            "guidance": self.number("guidance_scale", 1.0, -1000, 1000),
            "dynamic": self.flag("dynamic_resolution"),
            "crops": self.flag("dynamic_crops"),
            "batch": batch,
            "weight": self.number("weight", 1.0, 0, 1e6),
        }

    def sizes(self) -> list[Size | None]:
        """Of a slider: `resolutions` is a list of them; `resolution` may be one too, of pairs."""
        name = "resolutions" if "resolutions" in self.values else "resolution"
        value = self.values.get(name)
        several = isinstance(value, list) and (name == "resolutions" or any(isinstance(each, list) for each in value))
        return [self._size(name, each) for each in value] if several and value else [self.size(name)]

    def size(self, name: str) -> Size | None:
        return self._size(name, self.values[name]) if name in self.values else None

    def _size(self, name: str, value: Any) -> Size:
        """(width, height) of a side, or of kohya's [height, width]."""
        sides = value if isinstance(value, list) else [value, value]
        if len(sides) != 2 or any(
            type(side) is not int or not FACTOR <= side <= _MOST_PIXELS or side % FACTOR for side in sides
        ):
            expected = f"a side or [height, width], multiples of {FACTOR} to {_MOST_PIXELS}"
            raise self.error(name, f"is {_shown(value)}; expected {expected}")
        return sides[1], sides[0]

    def error(self, name: str, problem: str) -> RequestError:
        return RequestError(f"{printable(self.path.name)}, {self.where}: {name}", problem)


def _shown(value: object) -> str:
    return "missing" if value is None else printable(repr(value), 60)

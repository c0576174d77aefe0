"""Request: every knob of a painting, under the one name that Python, the command line and a picture's recipe use."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from gouache.errors import RequestError
from gouache.prompts.encode import Emphasis

Rng = Literal["cpu", "nv"]
SEEDS = 2**64
LISTS = ("lora", "lora_blocks", "embedding", "hypernet")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to paint and how. `None` means: the model's or the sampler's own.

    `prompt`, `negative`: A1111's prompt language. `sampler`, `schedule`: names as `gouache samplers` lists them.
    `steps` 1 to 1000. `cfg`: the guidance scale, 1 for none. `seed` 0 to 2^64 - 1; picture i has seed + i.
    `size` (width, height) in pixels, multiples of 8. `count` pictures, `batch` of them at once.
    `clip_skip` n reads the text encoder's n-th layer from the end. `emphasis` is what weights do.
    `init`: a picture to start from, of which `strength` (0 to 1) is repainted. `mask`: white where to paint.
    `image_cfg`: how closely instruct-pix2pix keeps to `init`. `depth`: a depth picture, near is white.
    `variation_seed` and `variation_strength` (0 to 1) turn the starting noise towards another seed's.
    `rng`: "cpu", or "nv" for the noise that NVIDIA GPUs draw; the same on every device. `eta`: the noise that DDIM and
    the ancestral samplers add, None for their usual. `ensd`: A1111's eta noise seed delta. `rescale`: guidance rescale.
    `lora`, `hypernet`: "NAME:STRENGTH", see `generate.splices`; `lora_blocks`: "NAME=PRESET"; `embedding`: names that
    the prompts then can use. `vae`: another autoencoder. Names are paths or of the library.
    """

    prompt: str = ""
    negative: str = ""
    sampler: str = "DPM++ 2M"
    schedule: str = "Automatic"
    steps: int = 25
    cfg: float = 7.0
    seed: int | None = None
    size: tuple[int, int] | None = None
    count: int = 1
    batch: int = 1
    clip_skip: int | None = None
    emphasis: Emphasis = "original"
    init: Path | None = None
    strength: float = 0.6
    mask: Path | None = None
    image_cfg: float = 1.5
    depth: Path | None = None
    variation_seed: int | None = None
    variation_strength: float = 0.0
    rng: Rng = "cpu"
    eta: float | None = None
    ensd: int = 0
    rescale: float = 0.0
    lora: tuple[str, ...] = ()
    lora_blocks: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    hypernet: tuple[str, ...] = ()
    vae: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative", "sampler", "schedule"):
            if not isinstance(getattr(self, name), str):
                raise RequestError(name, f"{getattr(self, name)!r} is not text")
        for name in LISTS:
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        if self.vae is not None and not isinstance(self.vae, str):
            raise RequestError("vae", f"{self.vae!r} is not the name of a file")
        for name, high in (("steps", 1000), ("count", 100_000), ("batch", 1024)):
            _within(name, getattr(self, name), 1, high, whole=True)
        for name, low, high in (("seed", 0, SEEDS - 1), ("variation_seed", 0, SEEDS - 1), ("clip_skip", 1, 48)):
            if getattr(self, name) is not None:
                _within(name, getattr(self, name), low, high, whole=True)
        for name, high in (
            ("cfg", 1000), ("image_cfg", 1000), ("strength", 1), ("variation_strength", 1), ("rescale", 1)
        ):  # fmt: skip
            _within(name, getattr(self, name), 0, high)
        if self.eta is not None:
            _within("eta", self.eta, 0, 100)
        _within("ensd", self.ensd, -SEEDS, SEEDS, whole=True)
        for name, choices in (("rng", get_args(Rng)), ("emphasis", get_args(Emphasis))):
            if getattr(self, name) not in choices:
                raise RequestError(name, f"{getattr(self, name)!r} is not known; use {' or '.join(choices)}")
        if self.size is not None:
            for side in self.size:
                if side % 8 or not 8 <= side <= 16384:
                    raise RequestError("size", f"{_size_text(self.size)} cannot be painted; sides are multiples of 8")
        if self.mask is not None and self.init is None:
            raise RequestError("mask", "needs a picture to change; give it as init")

    def settled(self) -> Request:
        """The same with a seed: the given one, or one drawn now."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(2**32))

    def to_json(self) -> dict[str, Any]:
        """Knobs by name, as JSON can say them."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values["size"] = None if self.size is None else _size_text(self.size)
        values |= {name: list(values[name]) for name in LISTS}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Request:
        """The reverse of `to_json`. Raises RequestError for knobs that are not known, or not of their type."""
        known = {each.name for each in fields(cls)}
        for name in values:
            if name not in known:
                raise RequestError(name, f"is not a setting; there are {', '.join(sorted(known))}")
        values = dict(values)
        if values.get("size") is not None:
            values["size"] = _read_size(values["size"])
        for name in ("init", "mask", "depth"):
            if values.get(name) is not None:
                if not isinstance(values[name], str | Path):
                    raise RequestError(name, f"{values[name]!r} is not the path of a picture")
                values[name] = Path(values[name])
        return cls(**values)


def parse_size(text: str) -> tuple[int, int]:
    """ "640x512" -> (640, 512); one number means a square."""
    match = re.fullmatch(r"\s*(\d{1,6})(?:\s*[x×X*]\s*(\d{1,6}))?\s*", text)
    if match is None:
        raise RequestError("size", f"{text!r} is not a size; write WIDTHxHEIGHT, for example 640x512")
    return int(match[1]), int(match[2] or match[1])


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """A list of names, or one."""
    values = (value,) if isinstance(value, str | Path) else value
    if not isinstance(values, list | tuple) or not all(isinstance(each, str | Path) for each in values):
        raise RequestError(name, f"{value!r} is not a list of names")
    return tuple(map(str, values))


def _read_size(value: Any) -> tuple[int, int]:
    if isinstance(value, str):
        return parse_size(value)
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(side) is int for side in value):
        return value[0], value[1]
    raise RequestError("size", f"{value!r} is not a size; write WIDTHxHEIGHT, for example 640x512")


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _within(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not low <= value <= high:
        kind = "whole numbers" if whole else "numbers"
        raise RequestError(name, f"{value!r} cannot be used; it takes {kind} from {low} to {high}")

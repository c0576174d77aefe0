"""Request: every setting of a generation, with one name in Python, on the command line and in a picture's recipe."""

from __future__ import annotations

import numbers
import re
import secrets
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from gouache.errors import RequestError
from gouache.images.input_image import ImageLike, InputImage, input_image
from gouache.images.upscale import LATENT_MODES
from gouache.prompts.encode import Emphasis

Rng = Literal["cpu", "nv"]
SEEDS = 2**64
INTEGERS = ("steps", "seed", "count", "batch", "clip_skip", "hires_steps", "variation_seed", "ensd")
FLOATS = ("cfg", "strength", "image_cfg", "hires_strength", "refiner_at", "variation_strength", "eta", "rescale")
MAX_SIDE = 16384  # pixels
LISTS = ("lora", "lora_blocks", "embedding", "hypernet")
IMAGES = ("init", "mask", "depth")
UPSCALERS = (*LATENT_MODES, "lanczos")
Size = tuple[int, int]


class Options(TypedDict, total=False):
    """The fields of `Request` except its prompt, as keyword arguments; sizes may be texts and pictures paths."""

    negative: str
    sampler: str
    schedule: str
    steps: int
    cfg: float | None
    seed: int | None
    size: Size | str | None
    count: int
    batch: int
    clip_skip: int | None
    emphasis: Emphasis
    init: ImageLike | None
    strength: float
    mask: ImageLike | None
    image_cfg: float
    depth: ImageLike | None
    hires: float | Size | str | None
    hires_steps: int | None
    hires_strength: float
    hires_upscaler: str
    hires_sampler: str | None
    hires_schedule: str | None
    hires_prompt: str
    hires_negative: str
    refiner: str | Path | None
    refiner_at: float
    variation_seed: int | None
    variation_strength: float
    rng: Rng
    eta: float | None
    ensd: int
    rescale: float
    lora: str | Path | list[str] | list[Path] | tuple[str, ...]
    lora_blocks: str | list[str] | tuple[str, ...]
    embedding: str | Path | list[str] | list[Path] | tuple[str, ...]
    hypernet: str | Path | list[str] | list[Path] | tuple[str, ...]
    vae: str | None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate and how. `None` means the default of the model or the sampler.

    `prompt`, `negative`: A1111's prompt language. `sampler`, `schedule`: names as `gouache samplers` lists them.
    `steps` 1 to 1000. `cfg`: the guidance scale, 1 for none; None is the model's own, which its file may state in its
    metadata as `gouache.cfg`, else 7. `seed` 0 to 2^64 - 1; picture i has seed + i.
    `size` (width, height) in pixels, multiples of 8. `count` pictures, `batch` of them at once.
    `clip_skip` n uses the text encoder's n-th layer from the end. `emphasis`: how weights in the prompt act.
    `init`: a picture to start from; `strength` (0 to 1) is A1111's denoising strength. `mask`: white where to paint;
    what it keeps is kept as a latent, so that its pixels change as much as encoding and decoding change them.
    `image_cfg`: how closely instruct-pix2pix keeps to `init`. `depth`: a depth picture, white is near. Pictures are
    paths, bytes, PIL images or arrays; each is opened once, here.
    `hires`: a second pass at a larger size, as a factor or (width, height); `hires_steps` (None: `steps`),
    `hires_strength` (0 to 1), `hires_upscaler` (one of `UPSCALERS`), `hires_sampler` and
    `hires_schedule` (None: the same), `hires_prompt` and `hires_negative` ("": the same).
    `refiner`: a model that takes over when the share `refiner_at` of the noise schedule is done (SDXL).
    `variation_seed` and `variation_strength` (0 to 1) move the starting noise towards another seed's.
    `rng`: "cpu", or "nv" for the noise of NVIDIA GPUs, on every device. `eta`: the noise that DDIM and the ancestral
    samplers add, None for their default. `ensd`: A1111's eta noise seed delta. `rescale`: guidance rescale.
    `lora`, `hypernet`: "NAME:STRENGTH", see `generate.adapters`; `lora_blocks`: "NAME=PRESET"; `embedding`: files that
    the prompts can use by name. `vae`: another autoencoder. Names are paths or names in the library.
    """

    prompt: str = ""
    negative: str = ""
    sampler: str = "DPM++ 2M"
    schedule: str = "Automatic"
    steps: int = 25
    cfg: float | None = None
    seed: int | None = None
    size: tuple[int, int] | None = None
    count: int = 1
    batch: int = 1
    clip_skip: int | None = None
    emphasis: Emphasis = "original"
    init: InputImage | None = None
    strength: float = 0.6
    mask: InputImage | None = None
    image_cfg: float = 1.5
    depth: InputImage | None = None
    hires: float | Size | None = None
    hires_steps: int | None = None
    hires_strength: float = 0.7
    hires_upscaler: str = "latent"
    hires_sampler: str | None = None
    hires_schedule: str | None = None
    hires_prompt: str = ""
    hires_negative: str = ""
    refiner: str | None = None
    refiner_at: float = 0.8
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
        for name in (*INTEGERS, *FLOATS):
            object.__setattr__(self, name, _number(getattr(self, name), whole=name in INTEGERS))
        for name in ("seed", "variation_seed"):
            if getattr(self, name) == -1:  # A1111's way to ask for a random one
                object.__setattr__(self, name, None)
        for name in ("prompt", "negative", "sampler", "schedule", "hires_prompt", "hires_negative"):
            if not isinstance(getattr(self, name), str):
                raise RequestError(name, f"{getattr(self, name)!r} is not text")
            try:
                getattr(self, name).encode()
            except UnicodeEncodeError as error:
                place = f"character {error.start + 1}"
                raise RequestError(name, f"has bytes that are not text in UTF-8 ({place}); write it in UTF-8") from None
        if self.size is not None:
            object.__setattr__(self, "size", _read_size(self.size))
        if self.hires is not None and not isinstance(self.hires, int | float):
            object.__setattr__(self, "hires", _read_hires(self.hires))
        for name in IMAGES:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, input_image(value, name))
        for name in LISTS:
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        for name in ("vae", "refiner", "hires_sampler", "hires_schedule"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise RequestError(name, f"{getattr(self, name)!r} is not a name")
        for name, high in (("steps", 1000), ("count", 100_000), ("batch", 1024)):
            _within(name, getattr(self, name), 1, high, whole=True)
        for name, low, high in (
            ("seed", 0, SEEDS - 1),
            ("variation_seed", 0, SEEDS - 1),
            ("clip_skip", 1, 48),
            ("hires_steps", 1, 1000),
        ):
            if getattr(self, name) is not None:
                _within(name, getattr(self, name), low, high, whole=True)
        for name, high in (
            ("image_cfg", 1000), ("strength", 1), ("variation_strength", 1), ("rescale", 1),
            ("hires_strength", 1), ("refiner_at", 1),
        ):  # fmt: skip
            _within(name, getattr(self, name), 0, high)
        for name, high in (("cfg", 1000), ("eta", 100)):
            if getattr(self, name) is not None:
                _within(name, getattr(self, name), 0, high)
        _within("ensd", self.ensd, -SEEDS, SEEDS, whole=True)
        for name, choices in (
            ("rng", get_args(Rng)), ("emphasis", get_args(Emphasis)), ("hires_upscaler", UPSCALERS)
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise RequestError(name, f"{getattr(self, name)!r} is not known; use {' or '.join(choices)}")
        for name in ("size", "hires"):
            size = getattr(self, name)
            if isinstance(size, tuple) and any(side % 8 or not 8 <= side <= MAX_SIDE for side in size):
                raise RequestError(
                    name, f"{_size_text(size)} cannot be used; sides are multiples of 8 from 8 to {MAX_SIDE}"
                )
        if self.hires is not None and not isinstance(self.hires, tuple):
            _within("hires", self.hires, 1, 16)
        if self.mask is not None and self.init is None:
            raise RequestError("mask", "needs a picture to change; give it as init")

    def hires_size(self, size: Size) -> Size:
        """The size of the second pass after a first one of `size`: a factor is rounded down to multiples of 8."""
        if isinstance(self.hires, tuple):
            return self.hires
        width, height = (max(8, int(side * (self.hires or 1)) // 8 * 8) for side in size)
        if max(width, height) > MAX_SIDE:
            raise RequestError("hires", f"{width}x{height} cannot be used; sides are at most {MAX_SIDE}")
        return width, height

    def settled(self) -> Request:
        """The same request with seeds: the given ones, or random ones."""
        settled = self if self.seed is not None else replace(self, seed=secrets.randbelow(2**32))
        if settled.variation_strength and settled.variation_seed is None:
            settled = replace(settled, variation_seed=secrets.randbelow(2**32))
        return settled

    def changed(self, values: dict[str, Any]) -> Request:
        """This request with other settings, as `from_json` reads them."""
        return Request.from_json({**{each.name: getattr(self, each.name) for each in fields(self)}, **values})

    def to_json(self) -> dict[str, Any]:
        """Settings by name, as JSON values. A picture is its path, or None if it was not read from a file."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        for name in ("size", "hires"):
            values[name] = _size_text(values[name]) if isinstance(values[name], tuple) else values[name]
        for name in IMAGES:
            path = values[name].path if values[name] is not None else None
            values[name] = None if path is None else str(path)
        return {name: list(value) if name in LISTS else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Request:
        """A request from settings by name, as JSON, `Options` or the command line have them; the reverse of `to_json`.

        Raises RequestError for settings that are not known or not of their type, or a picture that cannot be read.
        """
        known = {each.name for each in fields(cls)}
        for name in values:
            if name not in known:
                raise RequestError(name, f"is not a setting; known are {', '.join(sorted(known))}")
        values = dict(values)
        if isinstance(values.get("refiner"), Path):
            values["refiner"] = str(values["refiner"])
        return cls(**values)


def parse_size(text: str) -> Size:
    """ "640x512" -> (640, 512); one number means a square."""
    match = re.fullmatch(r"\s*(\d{1,6})(?:\s*[x×X*]\s*(\d{1,6}))?\s*", text)
    if match is None:
        raise RequestError("size", f"{text!r} is not a size; write WIDTHxHEIGHT, for example 640x512")
    return int(match[1]), int(match[2] or match[1])


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """One name, or a list of names."""
    values = (value,) if isinstance(value, str | Path) else value
    if not isinstance(values, list | tuple) or not all(isinstance(each, str | Path) for each in values):
        raise RequestError(name, f"{value!r} is not a list of names")
    return tuple(map(str, values))


def _read_size(value: Any) -> Size:
    if isinstance(value, str):
        return parse_size(value)
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(side) is int for side in value):
        return value[0], value[1]
    raise RequestError("size", f"{value!r} is not a size; write WIDTHxHEIGHT, for example 640x512")


def _read_hires(value: Any) -> float | Size:
    """A factor ("2", "1.5") or a size ("1024x768", [1024, 768])."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d*)?\s*", value):
        return float(value)
    try:
        return _read_size(value)
    except RequestError:
        raise RequestError(
            "hires", f"{value!r} is neither a factor, such as 2.0, nor a size, such as 1024x768"
        ) from None


def _size_text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _number(value: Any, *, whole: bool) -> Any:
    """NumPy's numbers as Python's, others as they are."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _within(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not low <= value <= high:
        kind = "whole numbers" if whole else "numbers"
        raise RequestError(name, f"{value!r} cannot be used; expected {kind} from {low} to {high}")

"""Sizes of models that are pretrained, by name: the file `presets.toml` beside this module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gouache.errors import RequestError, printable
from gouache.families.shapes import check_heads_divide
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec, VisionSpec
from gouache.outside import parse_toml, read_text

FILE = Path(__file__).with_name("presets.toml")


@dataclass(frozen=True)
class Preset:
    """The networks of a Stable Diffusion 1 of some size, the picture tower for its text encoder, and its resolution.

    `resolution` is the side of pictures in pixels. Raises ModelError or RequestError unless the networks fit together
    and a file of them is read as it is meant, where shapes do not say everything.
    """

    name: str
    resolution: int
    unet: UNetSpec
    vae: VaeSpec
    text: TextSpec
    vision: VisionSpec

    def __post_init__(self) -> None:
        check_heads_divide(self.unet)
        problems = {
            "unet.heads": self.unet.heads == 8 and not self.unet.linear_projection,
            "unet.context_dim": self.unet.context_dim == self.text.width,
            "unet.in_channels": self.unet.in_channels == self.unet.out_channels == self.vae.latent_channels,
            "vae.channels": self.vae.channels % 32 == 0 and self.unet.channels % 32 == 0,
            "vae.channel_mult": self.vae.factor == 8,
            "text.heads": self.text.heads * 64 == self.text.width,
            "text.vocabulary": self.text.vocabulary == TextSpec().vocabulary and self.text.projection is None,
            "vision.projection": self.vision.projection == self.text.width,
            "vision.image_size": self.vision.image_size % self.vision.patch_size == 0,
        }
        for name, fits in problems.items():
            if not fits:
                raise RequestError("size", f"{self.name}: {name} does not fit Stable Diffusion 1, or another network")

    @property
    def text_pictures(self) -> int:
        """The side of the pictures that the picture tower receives, in pixels."""
        return self.vision.image_size


def presets(path: Path = FILE) -> dict[str, Preset]:
    """All presets of the file by name. Raises RequestError or ModelError for one that is not a Stable Diffusion 1."""
    return {name: _preset(name, table) for name, table in parse_toml(read_text(path)).items()}


def preset(name: str) -> Preset:
    """Raises RequestError, which lists all presets, for an unknown name."""
    known = presets()
    if name not in known:
        raise RequestError("pretrain.initial_size", f"{printable(name, 40)!r} is not known; use {', '.join(known)}")
    return known[name]


def _preset(name: str, table: Mapping[str, Any]) -> Preset:
    kinds = {"unet": UNetSpec, "vae": VaeSpec, "text": TextSpec, "vision": VisionSpec}
    specs: dict[str, Any] = {}
    for part, kind in kinds.items():
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in table.get(part, {}).items()}
        specs[part] = kind(**values)
    return Preset(name, table["resolution"], **specs)

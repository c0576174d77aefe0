"""Which family a file belongs to: hints from its U-Net, from where its text encoders stand, from its metadata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from gouache.families.catalog import FAMILIES
from gouache.families.components import Reading
from gouache.families.family import Family
from gouache.families.found import Fact
from gouache.families.sd import OPENCLIP_H, SD1, SD2
from gouache.families.sdxl import OPENCLIP_BIGG, REFINER, SDXL
from gouache.families.svd import SVD
from gouache.nn.spec import TextSpec, UNetSpec

_ARCHITECTURES = (  # beginnings of `modelspec.architecture` and of kohya's `ss_base_model_version`
    ("stable-diffusion-xl-v1-refiner", REFINER),
    ("stable-diffusion-xl", SDXL),
    ("stable-diffusion-v1", SD1),
    ("stable-diffusion-v2", SD2),
    ("stable-video-diffusion", SVD),
    ("sdxl", SDXL),
    ("sd_v1", SD1),
    ("sd_1", SD1),
    ("sd_v2", SD2),
    ("sd_2", SD2),
)
_TEXT_PREFIXES = {
    place.prefix: family for family in FAMILIES for place in family.places if place.component.startswith("text_encoder")
}


def family_hints(
    readings: Mapping[str, Reading], metadata: Mapping[str, str], name: str
) -> Iterator[Fact[Family | None]]:
    """What speaks for which family, the strongest first. `name` is the file's, which has the last and least word."""
    unet = readings.get("unet")
    if unet is not None and unet.video:
        yield Fact(SVD, "the U-Net has layers across time (time_stack)", "certain")
    elif unet is not None and isinstance(unet.spec, UNetSpec):
        yield family_of_unet(unet.spec)
    yield from _text_hints(readings)
    yield from metadata_hints(metadata)
    if set(readings) == {"vae"}:
        xl = "xl" in name.lower()
        evidence = "the autoencoders of SD1, SD2 and SDXL have the same names and shapes"
        yield Fact(SDXL if xl else None, evidence + ("; the file's name speaks of XL" if xl else ""), "guess")


def family_of_unet(spec: UNetSpec) -> Fact[Family | None]:
    """The family whose topology this U-Net has, whatever its widths."""
    shape = replace(spec, in_channels=4, heads=None, head_channels=None)
    for family in FAMILIES:
        if family.unet is not None and shape == replace(family.unet, heads=None, head_channels=None):
            return Fact(family, f"the U-Net has exactly the shapes of {family.title}", "certain")

    attends = [bool(depth) for depth in spec.attention_depth]
    if not spec.linear_projection:
        family, trait = SD1, "1x1 convolutions around its transformers"
    elif not spec.vector_channels:
        family, trait = SD2, "linear layers around its transformers and no extra vector"
    elif attends[0]:
        family, trait = SD2, "an extra vector and attention at the finest level, as the unCLIP variant has"
    elif attends[-1]:
        family, trait = SDXL, "an extra vector and attention at the deepest level but not at the finest"
    else:
        family, trait = REFINER, "an extra vector, and no attention at the finest and the deepest level"
    same = family.unet is not None and attends == [bool(depth) for depth in family.unet.attention_depth]
    widths = ", ".join(str(spec.channels * mult) for mult in spec.channel_mult)
    evidence = f"the U-Net has {trait}; its levels are {widths} wide"
    return Fact(family, evidence, "certain" if same else "likely")


def metadata_hints(metadata: Mapping[str, str]) -> Iterator[Fact[Family | None]]:
    """What training tools and hubs wrote into the header."""
    for key in ("modelspec.architecture", "ss_base_model_version"):
        text = metadata.get(key, "")
        for start, family in _ARCHITECTURES:
            if text.startswith(start):
                yield Fact(family, f"the metadata says {key} = {text[:80]!r}", "likely")
                break


def family_of_width(width: int) -> Family | None:
    """The family whose released U-Net is told prompts of this width: for adapters, which have little else."""
    return next((family for family in FAMILIES if family.unet and family.unet.context_dim == width), None)


def _text_hints(readings: Mapping[str, Reading]) -> Iterator[Fact[Family | None]]:
    towers = [reading for name, reading in readings.items() if name.startswith("text_encoder")]
    for reading in towers:
        if (family := _TEXT_PREFIXES.get(reading.prefix)) is not None:
            yield Fact(family, f"a text encoder stands under {reading.prefix}", "likely")
    if len(readings) == len(towers) == 1 and isinstance(spec := towers[0].spec, TextSpec):
        for family, known in ((SD2, OPENCLIP_H), (SDXL, OPENCLIP_BIGG)):
            if (spec.width, spec.layers) == (known.width, known.layers):
                yield Fact(family, f"this text tower has the size of one of {family.title}", "likely")

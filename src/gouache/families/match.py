"""Hints on the family of a file: from its U-Net, from the prefixes of its text encoders, from its metadata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from gouache.families.catalog import FAMILIES
from gouache.families.components import Candidate
from gouache.families.family import Family
from gouache.families.found import Fact
from gouache.families.sd import OPENCLIP_H, SD1, SD2
from gouache.families.sdxl import OPENCLIP_BIGG, REFINER, SDXL
from gouache.families.svd import SVD
from gouache.nn.spec import TextSpec, UNetSpec

_ARCHITECTURES = (  # prefixes of the values of `modelspec.architecture` and of kohya's `ss_base_model_version`
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
    location.prefix: family
    for family in FAMILIES
    for location in family.locations
    if location.component.startswith("text_encoder")
}


def family_hints(
    candidates: Mapping[str, Candidate], metadata: Mapping[str, str], name: str
) -> Iterator[Fact[Family | None]]:
    """Hints on the family, strongest first. `name` is the file's name, the weakest hint."""
    unet = candidates.get("unet")
    if unet is not None and unet.video:
        yield Fact(SVD, "the U-Net has temporal layers (time_stack)", "certain")
    elif unet is not None and isinstance(unet.spec, UNetSpec):
        yield family_of_unet(unet.spec)
    yield from _text_hints(candidates)
    yield from metadata_hints(metadata)
    if set(candidates) == {"vae"}:
        xl = "xl" in name.lower()
        evidence = "the autoencoders of SD1, SD2 and SDXL have the same names and shapes"
        yield Fact(SDXL if xl else None, evidence + ("; the file's name contains XL" if xl else ""), "guess")


def family_of_unet(spec: UNetSpec) -> Fact[Family | None]:
    """The family whose topology this U-Net has; its widths may be narrower."""
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
        family, trait = SD2, "an extra vector and attention at the finest level, like the unCLIP variant"
    elif attends[-1]:
        family, trait = SDXL, "an extra vector and attention at the deepest level but not at the finest"
    else:
        family, trait = REFINER, "an extra vector and no attention at the finest and deepest levels"
    same = family.unet is not None and attends == [bool(depth) for depth in family.unet.attention_depth]
    widths = ", ".join(str(spec.channels * mult) for mult in spec.channel_mult)
    evidence = f"the U-Net has {trait}; its levels have the widths {widths}"
    return Fact(family, evidence, "certain" if same else "likely")


def metadata_hints(metadata: Mapping[str, str]) -> Iterator[Fact[Family | None]]:
    """Hints from the metadata that training tools and hubs write into the header."""
    for key in ("modelspec.architecture", "ss_base_model_version"):
        text = metadata.get(key, "")
        for start, family in _ARCHITECTURES:
            if text.startswith(start):
                yield Fact(family, f"the metadata states {key} = {text[:80]!r}", "likely")
                break


def family_of_width(width: int) -> Family | None:
    """The family whose released U-Net has this context width; for adapters, which show little else."""
    return next((family for family in FAMILIES if family.unet and family.unet.context_dim == width), None)


def _text_hints(candidates: Mapping[str, Candidate]) -> Iterator[Fact[Family | None]]:
    towers = [candidate for name, candidate in candidates.items() if name.startswith("text_encoder")]
    for candidate in towers:
        if (family := _TEXT_PREFIXES.get(candidate.prefix)) is not None:
            yield Fact(family, f"it has a text encoder under {candidate.prefix}", "likely")
    if len(candidates) == len(towers) == 1 and isinstance(spec := towers[0].spec, TextSpec):
        for family, known in ((SD2, OPENCLIP_H), (SDXL, OPENCLIP_BIGG)):
            if (spec.width, spec.layers) == (known.width, known.layers):
                yield Fact(family, f"this text encoder has the size of one of {family.title}", "likely")

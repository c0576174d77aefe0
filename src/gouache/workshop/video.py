"""Convert Stable Video Diffusion between its single file and a diffusers folder.

The single file has two autoencoders: `first_stage_model`, whose decoder has temporal layers, and an ordinary one that
encodes the first frame. A folder has one `vae`: the decoder of the former and the encoder of the latter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gouache.errors import ModelError, printable
from gouache.families.family import ComponentLocation
from gouache.families.found import Component, Found
from gouache.families.shapes import unet_spec, vae_spec, vision_spec
from gouache.families.svd import SVD
from gouache.files.record import ModelFile
from gouache.layouts.diffusers_video import video_unet_rules, video_vae_rules
from gouache.layouts.original_video import video_unet_shapes, video_vae_shapes, vision_shapes
from gouache.layouts.rules import Origin, Rename, Rule, Shape, invert, plan
from gouache.workshop import configs_video
from gouache.workshop.part import Part

PARTS = ("unet", "vae", "image_encoder")

_PLACES = {place.component: place for place in SVD.locations}
_ENCODER = ("encoder.", "quant_conv.")  # the prefixes of an autoencoder's encoding half


def part(name: str, file: ModelFile, found: Found) -> Part:
    """One of the three subfolders; ModelError if a tensor is missing or its shape does not fit the others."""
    origins = _vae_origins(file, found) if name == "vae" else found.component(name).origins
    sources = {each: info.shape for each, info in file.tensors.items()}
    try:
        shapes = {each: origin.shape(sources) for each, origin in origins.items()}
        rules, expected, config = _description(name, shapes, found)
        _check_complete(shapes, expected)
    except ModelError as error:
        raise ModelError(f"{printable(str(found.path))} has no usable {name}: {error}") from None
    return Part(name, {each: origins[each] for each in expected}, rules, config)


def as_single(found: Found) -> Found:
    """`found`; if it describes a video folder, with its `vae` split into the two components of a single file."""
    vae = found.components.get("vae")
    if found.family.value is not SVD or vae is None or vae.layout != "diffusers":
        return found
    return replace(found, components={**found.components, **{piece.name: piece for piece in pieces(vae)}})


def pieces(vae: Component) -> tuple[Component, Component]:
    """A folder's `vae` as two components of a single file, `vae` and `frame_vae`, neither of them complete."""
    encoder = {name: origin for name, origin in vae.origins.items() if name.startswith(_ENCODER)}
    decoder = {name: origin for name, origin in vae.origins.items() if name not in encoder}
    return _piece(vae, _PLACES["vae"], decoder), _piece(vae, _PLACES["frame_vae"], encoder)


def _description(
    name: str, shapes: Mapping[str, Shape], found: Found
) -> tuple[tuple[Rule, ...], dict[str, Shape], dict[str, Any]]:
    """(table to diffusers' names, {name: shape} of all required tensors, config.json) of a network."""
    if name == "unet":
        unet = unet_spec(shapes)
        rules = video_unet_rules([bool(depth) for depth in unet.attention_depth], unet.res_blocks)
        return invert(rules), video_unet_shapes(unet), configs_video.unet(unet, found)
    if name == "vae":
        vae = vae_spec(shapes)
        return invert(video_vae_rules(len(vae.channel_mult))), video_vae_shapes(vae), configs_video.vae(vae, found)
    vision = vision_spec(shapes)
    return (Rename("{name*}", "{name*}"),), vision_shapes(vision), configs_video.image_encoder(vision)


def _check_complete(shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise ModelError(f"{len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ModelError(f"{name} has shape {list(shapes[name])}, but the others require {list(shape)}")


def _piece(vae: Component, place: ComponentLocation, origins: Mapping[str, Origin]) -> Component:
    return replace(vae, name=place.component, prefix=place.prefix, layout=place.layout, origins=origins)


def _vae_origins(file: ModelFile, found: Found) -> dict[str, Origin]:
    """The origins of a folder's `vae`, under the names of `video_vae_rules`."""
    vae = found.component("vae")
    if vae.layout == "diffusers":
        return dict(vae.origins)
    prefix = _PLACES["frame_vae"].prefix
    # Files made from folders hold only the encoding half of that autoencoder, so they have no complete `frame_vae`.
    encoder = plan([Rename(f"{prefix}{each}{{rest*}}", f"{each}{{rest*}}") for each in _ENCODER], file.tensors).origins
    if not encoder:
        raise ModelError(
            f"{printable(str(found.path))} cannot be written as a diffusers folder: it has no tensors under {prefix}, "
            "where single files have the encoder of the first frame"
        )
    decoder = {name: origin for name, origin in vae.origins.items() if name.startswith("decoder.")}
    return {**encoder, **decoder}

"""Between the layouts that models are kept in: single files in the original names, and diffusers folders.

Both directions are made of the tables by which the file was identified, so that going there and back gives every
tensor again. What a layout has no place for is left over, and kept beside by whoever writes the result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gouache.errors import ModelError, printable
from gouache.families.family import Family, Place
from gouache.families.found import Component, Found
from gouache.families.identify import identify
from gouache.families.svd import SVD
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.layouts.diffusers import unet_rules, vae_rules
from gouache.layouts.rules import Rename, Rule, invert, plan
from gouache.layouts.text import BARE, OPENCLIP
from gouache.layouts.vision import OPENCLIP_VISION
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec
from gouache.workshop import configs, configs_video, derive, save, video
from gouache.workshop.part import Part

_SAME: tuple[Rule, ...] = (Rename("{name*}", "{name*}"),)
_PLACES = "gouache.places"  # the metadata that says how a file named its components, where that is not the usual way


@dataclass(frozen=True)
class Laid:
    """A model in another layout, and the tensors of the old one that have no place in it."""

    file: ModelFile
    leftovers: ModelFile


def single_file(file: ModelFile, found: Found, leftovers: ModelFile | None = None) -> ModelFile:
    """A diffusers folder as a single file: components under the prefixes and names that files of its family have.

    `leftovers` are what stood in the single file that the folder was made of; they come back under their own names,
    and say where that file was unlike others of its family.
    """
    family, found = _family(found), video.as_single(found)
    places = _places(family, found, leftovers)
    parts = [
        derive.prefix(_named(file, found.component(place.component), place.layout), place.prefix) for place in places
    ]
    if leftovers is not None:
        parts = [_restored(part, leftovers) for part in parts] + [leftovers]
    base = replace(file, format="safetensors", extra={}, notes=(), metadata=_metadata(file, leftovers))
    return derive.join(derive.keep(base, ()), *parts)


def opened(path: Path, *, prediction: str | None = None, family: str | None = None) -> tuple[ModelFile, Found]:
    """The model at `path` in the names of a single file, whatever its form; a folder with the leftovers it keeps."""
    file = open_model(path)
    found = identify(file, prediction=prediction, family=family)
    if found.kind.value != "diffusers folder" or found.family.value is None:
        return file, found
    single = single_file(file, found, leftovers_of(path))
    return single, identify(single, prediction=prediction, family=found.family.value.name)


def leftovers_of(folder: Path) -> ModelFile | None:
    """What a folder that we wrote keeps of the single file that it was made of."""
    beside = folder / save.LEFTOVERS
    return open_model(beside) if beside.is_file() else None


def folder(file: ModelFile, found: Found) -> Laid:
    """Any checkpoint as a diffusers folder: its tensors called `component/name`, and its JSON files in `extra`."""
    family = _family(found)
    names = video.PARTS if family is SVD else [place.component for place in family.places]
    parts = [_part(name, file, found) for name in names]
    extra: dict[str, Any] = {
        **(configs_video if family is SVD else configs).pipeline(found),
        **{f"{part.name}/config.json": part.config for part in parts},
    }
    taken = {source for part in parts for origin in part.origins.values() for source in origin.sources}
    rest = derive.keep(file, (name for name in file if name not in taken))
    unusual = _unusual(family, found)
    metadata = {**file.metadata, **({_PLACES: json.dumps(unusual)} if unusual else {})}
    base = replace(derive.keep(file, ()), format="diffusers folder", extra=extra, notes=(), metadata={})
    moved = [derive.prefix(_in_folder(file, part), f"{part.name}/") for part in parts]
    return Laid(derive.join(base, *moved), replace(rest, metadata=metadata))


def component_folder(file: ModelFile, part: Component, found: Found) -> ModelFile:
    """One component as its folder in a diffusers model."""
    alone = _part(part.name, file, found)
    extra = {"config.json": alone.config}
    return replace(_in_folder(file, alone), format="component folder", extra=extra, notes=(), metadata={})


def _in_folder(file: ModelFile, part: Part) -> ModelFile:
    """The tensors of `part` under diffusers' names, without a prefix."""
    inner = derive.arrange(file, part.origins)
    return derive.arrange(inner, plan(part.rules, inner.tensors).origins)


def _family(found: Found) -> Family:
    if found.family.value is None:
        raise ModelError(f"{printable(str(found.path))}: the family cannot be told ({found.family.evidence})")
    return found.family.value


# ---- towards a single file


def _named(file: ModelFile, part: Component, layout: str) -> ModelFile:
    """One component under the names of `layout`: through the file's own table to the network's, and on from there."""
    return _in_names_of(layout, derive.arrange(file, part.origins))


def _in_names_of(layout: str, tensors: ModelFile) -> ModelFile:
    """`tensors`, in the network's names, under those of `layout`."""
    rules: dict[str, tuple[Rule, ...]] = {
        "openclip": invert(OPENCLIP + OPENCLIP_VISION),
        "transformers without text_model": invert(BARE),
    }
    return derive.arrange(tensors, plan(rules.get(layout, _SAME), tensors.tensors).origins)


def as_in(part: Component, tensors: ModelFile, family: Family | None) -> ModelFile:
    """`tensors`, in the network's names, under the names and the prefix that `part` has in its file.

    A folder's component is put where single files of its family keep it.
    """
    prefix, kind = part.prefix, part.layout
    if family is SVD and part.name == "vae" and kind == "diffusers":
        return derive.join(
            derive.keep(tensors, ()),
            *(as_in(piece, derive.keep(tensors, piece.origins), family) for piece in video.pieces(part)),
        )
    if kind == "diffusers" or prefix.endswith("/"):
        place = next((p for p in (family.places if family else ()) if p.component == part.name), None)
        prefix, kind = (place.prefix, place.layout) if place is not None else ("", "original")
    return derive.prefix(_in_names_of(kind, tensors), prefix)


def _places(family: Family, found: Found, leftovers: ModelFile | None) -> list[Place]:
    """Where the components go: the family's places, or where the file that the folder was made of had them."""
    said: dict[str, list[str]] = json.loads(({} if leftovers is None else leftovers.metadata).get(_PLACES, "{}"))
    known = [place for place in family.places if place.component in found.components or place.component not in said]
    return [
        replace(place, prefix=said[place.component][0], layout=said[place.component][1])
        if place.component in said
        else place
        for place in known
    ]


def _restored(part: ModelFile, leftovers: ModelFile) -> ModelFile:
    """`part` without what stands among the leftovers: there it is whole."""
    return derive.keep(part, (name for name in part if name not in leftovers))


def _metadata(file: ModelFile, leftovers: ModelFile | None) -> Mapping[str, str]:
    kept = dict(leftovers.metadata) if leftovers is not None else {}
    kept.pop(_PLACES, None)
    return {**file.metadata, **kept}


# ---- towards a folder


def _part(name: str, file: ModelFile, found: Found) -> Part:
    """The component `name` as a folder of a diffusers model."""
    family = _family(found)
    if family is SVD:
        return video.part(name, file, found)
    place = next(place for place in family.places if place.component == name)
    part = _for_folder(place, found.component(name), family)
    return Part(name, part.origins, _folder_rules(part), configs.component(part, found))


def _for_folder(place: Place, part: Component, family: Family) -> Component:
    """`part` as diffusers keeps it: SD2's text tower without its last block, and no projection where none is read."""
    spec = part.spec
    if spec is None:
        raise ModelError(f"{family.title} cannot be written as a diffusers folder yet: its {part.name} is not built")
    if not isinstance(spec, TextSpec):
        return part
    recipe = family.text
    pooled = recipe.pooled if recipe is not None else None
    layers = spec.layers
    if family.name == "sd2" and layers == getattr(place.spec, "layers", layers):
        layers -= 1
    projection = spec.projection if place.component == pooled else None
    last = tuple(f"text_model.encoder.layers.{index}." for index in range(layers, spec.layers))
    origins = {
        name: origin
        for name, origin in part.origins.items()
        if not name.startswith(last) and (projection or name != "text_projection.weight")
    }
    return replace(part, spec=replace(spec, layers=layers, projection=projection), origins=origins)


def _folder_rules(part: Component) -> tuple[Rule, ...]:
    """From the network's names to those in a diffusers folder."""
    if isinstance(part.spec, UNetSpec):
        return invert(unet_rules([bool(depth) for depth in part.spec.attention_depth], part.spec.res_blocks))
    if isinstance(part.spec, VaeSpec):
        return invert(vae_rules(len(part.spec.channel_mult)))
    return _SAME


def _unusual(family: Family, found: Found) -> dict[str, list[str]]:
    """Components that the file keeps elsewhere, or names otherwise, than files of its family do: [prefix, layout]."""
    unusual = dict[str, list[str]]()
    for place in family.places:
        part = found.components.get(place.component)
        if part is None:
            continue
        if (part.prefix, part.layout) != (place.prefix, place.layout) and part.layout != "diffusers":
            unusual[place.component] = [part.prefix, part.layout]
    return unusual

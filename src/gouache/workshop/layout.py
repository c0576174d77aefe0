"""Convert between the two layouts of models: single files with the original names, and diffusers folders.

Both directions use the tables by which the file was identified, so that a round trip restores every tensor. Tensors
that a layout has no place for are its leftovers; whoever writes the result saves them next to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gouache.errors import DamagedFile, ModelError, NotAModel, printable
from gouache.families.family import ComponentLocation, Family
from gouache.families.found import Component, Found
from gouache.families.identify import identify
from gouache.families.svd import SVD
from gouache.files.open import open_model
from gouache.files.record import ModelFile, TensorInfo
from gouache.layouts.diffusers import unet_rules, vae_rules
from gouache.layouts.rules import Rename, Rule, invert, plan
from gouache.layouts.text import BARE, OPENCLIP
from gouache.layouts.vision import OPENCLIP_VISION
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec
from gouache.outside import MalformedText, parse_json
from gouache.workshop import configs, configs_video, derive, save, video
from gouache.workshop.part import Part

_SAME: tuple[Rule, ...] = (Rename("{name*}", "{name*}"),)
AVERAGES = "model_ema."  # before the names of EMA weights in single files
_PLACES = "gouache.places"  # metadata key: prefix and layout of components that differ from the family's usual ones


@dataclass(frozen=True)
class Folder:
    """A model in the layout of a diffusers folder, and the tensors of the source that have no place in it."""

    file: ModelFile
    leftovers: ModelFile


def single_file(file: ModelFile, found: Found, leftovers: ModelFile | None = None) -> ModelFile:
    """A diffusers folder as a single file: components under the usual prefixes and names of its family.

    `leftovers` are tensors of the single file that the folder was made from. They keep their names, and their metadata
    records where that file deviated from the usual names.
    """
    family, found = _family(found), video.as_single(found)
    places = _places(family, found, leftovers)
    parts = [
        derive.prefix(_renamed(file, found.component(place.component), place.layout), place.prefix) for place in places
    ]
    if leftovers is not None:
        parts = [_without(part, leftovers) for part in parts] + [leftovers]
    base = replace(file, format="safetensors", extra={}, notes=(), metadata=_metadata(file, leftovers))
    return derive.join(derive.keep(base, ()), *parts)


def open_weights(path: Path) -> ModelFile:
    """The model at `path`, for every command that reads weights. Raises FileError; NotAModel if it has no tensors."""
    file = open_model(path)
    if not len(file):
        raise NotAModel(path, "holds no tensors, so it is not a model")
    return file


def open_for_report(path: Path) -> ModelFile:
    """The same for commands that only report: what a training run stores besides weights is enough."""
    file = open_model(path)
    if not len(file) and not tensors_in(dict(file.extra)):
        raise NotAModel(path, "holds no tensors, so it is not a model")
    return file


def tensors_in(value: object) -> list[TensorInfo]:
    """Every tensor that an unpickled value describes."""
    stack, found = [value], list[TensorInfo]()
    while stack:
        top = stack.pop()
        if isinstance(top, TensorInfo):
            found.append(top)
        elif isinstance(top, dict):
            stack += list(top.values())
        elif isinstance(top, list | tuple):
            stack += list(top)
    return found


def opened(path: Path, *, prediction: str | None = None, family: str | None = None) -> tuple[ModelFile, Found]:
    """The model at `path`, file or folder, with the names of a single file; for a folder, with its leftovers."""
    file = open_weights(path)
    found = identify(file, prediction=prediction, family=family)
    if found.kind.value != "diffusers folder" or found.family.value is None:
        return file, found
    single = single_file(file, found, leftovers_of(path))
    return single, identify(single, prediction=prediction, family=found.family.value.name)


def leftovers_of(folder: Path) -> ModelFile | None:
    """The leftovers in a folder that Gouache made from a single file; None if there are none."""
    path = folder / save.LEFTOVERS
    return open_model(path) if path.is_file() else None


def folder(file: ModelFile, found: Found) -> Folder:
    """A checkpoint in the layout of a diffusers folder: tensors named `component/name`, JSON files in `extra`."""
    family = _family(found)
    names = video.PARTS if family is SVD else [place.component for place in family.locations]
    parts = [_part(name, file, found) for name in names]
    extra: dict[str, Any] = {
        **(configs_video if family is SVD else configs).pipeline(found),
        **{f"{part.name}/config.json": part.config for part in parts},
    }
    used = {source for part in parts for origin in part.origins.values() for source in origin.sources}
    rest = derive.keep(file, (name for name in file if name not in used))
    unusual = _unusual_places(family, found)
    metadata = {**file.metadata, **({_PLACES: json.dumps(unusual)} if unusual else {})}
    base = replace(derive.keep(file, ()), format="diffusers folder", extra=extra, notes=(), metadata={})
    renamed = [derive.prefix(_in_folder(file, part), f"{part.name}/") for part in parts]
    return Folder(derive.join(base, *renamed), replace(rest, metadata=metadata))


def component_folder(file: ModelFile, part: Component, found: Found) -> ModelFile:
    """One component as a folder, as in a diffusers model."""
    single = _part(part.name, file, found)
    extra = {"config.json": single.config}
    return replace(_in_folder(file, single), format="component folder", extra=extra, notes=(), metadata={})


def _in_folder(file: ModelFile, part: Part) -> ModelFile:
    """The tensors of `part` under diffusers' names, without a prefix."""
    inner = derive.arrange(file, part.origins)
    return derive.arrange(inner, plan(part.rules, inner.tensors).origins)


def _family(found: Found) -> Family:
    if found.family.value is None:
        raise ModelError(f"{printable(str(found.path))}: model family {found.family.evidence}")
    return found.family.value


def reasons(found: Found) -> dict[str, str]:
    """{tensor that nothing needs: reason}, with one reason for all EMA weights, for lists that a person reads."""
    averages = set(found.ema_names.values())
    return {name: "EMA weights" if name in averages else reason for name, reason in found.leftovers.items()}


# ---- to a single file


def _renamed(file: ModelFile, part: Component, layout: str) -> ModelFile:
    """One component under the names of `layout`: from the file's names to the network's, then to those of `layout`."""
    return _in_names_of(layout, derive.arrange(file, part.origins))


def _in_names_of(layout: str, tensors: ModelFile) -> ModelFile:
    """`tensors`, which have the network's names, under the names of `layout`."""
    rules: dict[str, tuple[Rule, ...]] = {
        "openclip": invert(OPENCLIP + OPENCLIP_VISION),
        "transformers without text_model": invert(BARE),
    }
    return derive.arrange(tensors, plan(rules.get(layout, _SAME), tensors.tensors).origins)


def as_in(part: Component, tensors: ModelFile, family: Family | None) -> ModelFile:
    """`tensors`, which have the network's names, under the names and the prefix that `part` has in its file.

    A component of a diffusers folder, or one that is only there as EMA weights, gets the names and the prefix of its
    family's single files.
    """
    prefix, layout = part.prefix, part.layout
    if family is SVD and part.name == "vae" and layout == "diffusers":
        return derive.join(
            derive.keep(tensors, ()),
            *(as_in(piece, derive.keep(tensors, piece.origins), family) for piece in video.pieces(part)),
        )
    averages = any(source.startswith(AVERAGES) for origin in part.origins.values() for source in origin.sources)
    if layout == "diffusers" or prefix.endswith("/") or averages:
        place = next((p for p in (family.locations if family else ()) if p.component == part.name), None)
        prefix, layout = (place.prefix, place.layout) if place is not None else ("", "original")
    return derive.prefix(_in_names_of(layout, tensors), prefix)


def _places(family: Family, found: Found, leftovers: ModelFile | None) -> list[ComponentLocation]:
    """Prefix and layout of each component: the family's usual ones, or those of the file the folder was made from."""
    stored = _stored_places(leftovers) if leftovers is not None else {}
    known = [
        place for place in family.locations if place.component in found.components or place.component not in stored
    ]
    return [
        replace(place, prefix=stored[place.component][0], layout=stored[place.component][1])
        if place.component in stored
        else place
        for place in known
    ]


def _stored_places(leftovers: ModelFile) -> dict[str, list[str]]:
    """{component: [prefix, layout]} as `_unusual_places` stored it. Raises DamagedFile for anything else."""
    try:
        stored = parse_json(leftovers.metadata.get(_PLACES, "{}"))
    except MalformedText as error:
        raise DamagedFile(leftovers.path, f"its metadata {_PLACES} {error}") from None
    valid = isinstance(stored, dict) and all(
        isinstance(each, list) and len(each) == 2 and all(isinstance(text, str) for text in each)
        for each in stored.values()
    )
    if not valid:
        raise DamagedFile(leftovers.path, f"its metadata {_PLACES} is not a prefix and a layout for each component")
    return stored


def _without(part: ModelFile, leftovers: ModelFile) -> ModelFile:
    """`part` without the tensors that the leftovers hold too: those in the leftovers are complete."""
    return derive.keep(part, (name for name in part if name not in leftovers))


def _metadata(file: ModelFile, leftovers: ModelFile | None) -> Mapping[str, str]:
    kept = dict(leftovers.metadata) if leftovers is not None else {}
    kept.pop(_PLACES, None)
    return {**file.metadata, **kept}


# ---- to a folder


def _part(name: str, file: ModelFile, found: Found) -> Part:
    """The component `name` as a subfolder of a diffusers model."""
    family = _family(found)
    if family is SVD:
        return video.part(name, file, found)
    place = next(place for place in family.locations if place.component == name)
    part = _for_folder(place, found.component(name), family)
    return Part(name, part.origins, _folder_rules(part), configs.component(part, found))


def _for_folder(place: ComponentLocation, part: Component, family: Family) -> Component:
    """`part` as diffusers stores it: SD2's text encoder without its last block, and no projection that is not used."""
    spec = part.spec
    if spec is None:
        raise ModelError(
            f"{family.title} cannot be written as a diffusers folder yet: its {part.name} is not implemented"
        )
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
    """The table from the network's names to those in a diffusers folder."""
    if isinstance(part.spec, UNetSpec):
        return invert(unet_rules([bool(depth) for depth in part.spec.attention_depth], part.spec.res_blocks))
    if isinstance(part.spec, VaeSpec):
        return invert(vae_rules(len(part.spec.channel_mult)))
    return _SAME


def _unusual_places(family: Family, found: Found) -> dict[str, list[str]]:
    """{component: [prefix, layout]} of components whose prefix or layout differs from the family's usual ones."""
    unusual = dict[str, list[str]]()
    for place in family.locations:
        part = found.components.get(place.component)
        if part is None:
            continue
        if (part.prefix, part.layout) != (place.prefix, place.layout) and part.layout != "diffusers":
            unusual[place.component] = [part.prefix, part.layout]
    return unusual

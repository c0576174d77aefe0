"""Which tensors of a file make which component, under whose names, and whether the component is whole.

A component is known by the prefix that single files or folders put before it, or, alone in a file, by its own names.
Its names are translated by a table of `layouts`, its spec read from its shapes, and the shapes that this spec asks
for compared with those that are there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gouache.errors import ModelError, printable
from gouache.families.catalog import FAMILIES
from gouache.families.family import Family, Spec
from gouache.families.found import Component, Fact
from gouache.families.shapes import parted, text_config, text_spec, unet_heads, unet_spec, vae_spec
from gouache.files.record import ModelFile
from gouache.layouts.diffusers import unet_rules, unet_topology, vae_rules, vae_topology
from gouache.layouts.diffusers_video import video_unet_rules, video_vae_rules
from gouache.layouts.original import text_shapes, unet_shapes, vae_shapes
from gouache.layouts.rules import Plan, Rename, Rule, Shape, plan, under
from gouache.layouts.text import text_layout
from gouache.layouts.vision import vision_layout
from gouache.nn.spec import TextSpec, UNetSpec

PREFIXES: dict[str, str] = {
    **{place.prefix: place.component for family in FAMILIES for place in family.places},
    **{f"{name}/": name for name in ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder")},
    "diffusion_model.": "unet",  # U-Nets saved alone by ComfyUI
    "vae.": "vae",
}
"""What stands before the names of a component -> the component. None of them begins with another."""

_SAME: tuple[Rule, ...] = (Rename("{name*}", "{name*}"),)
_UNET_HEADS = frozenset(("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out"))
_FOLDER_UNET_HEADS = frozenset(("down_blocks", "mid_block", "up_blocks", "time_embedding", "add_embedding"))
_FOLDER_UNET_ENDS = frozenset(("conv_in", "conv_out", "conv_norm_out"))
_VAE_PARTS = frozenset(("conv_in", "conv_out", "norm_out", "conv_norm_out")) | frozenset(
    ("down", "up", "mid", "down_blocks", "up_blocks", "mid_block")
)
_TEXT_STRAYS = frozenset(("text_projection", "logit_scale", "attn_mask", "visual", "vision_model", "visual_projection"))
_VIDEO = (".time_stack.", ".time_mixer.", "temporal")


@dataclass(frozen=True)
class Reading:
    """A component as far as its own tensors tell. `trouble` says why it cannot be used, "" if it is whole."""

    name: str
    prefix: str
    layout: str
    rules: tuple[Rule, ...]
    plan: Plan
    spec: Spec | None = None
    trouble: str = ""
    surplus: tuple[str, ...] = ()
    video: bool = False

    @property
    def count(self) -> int:
        """How many tensors of the file it takes."""
        return len({source for origin in self.plan.origins.values() for source in origin.sources})


def read_components(file: ModelFile, names: Iterable[str]) -> tuple[dict[str, Reading], tuple[str, ...]]:
    """The components that `names` of `file` make up, whole or not, and the names that belong to none."""
    groups: dict[str, list[str]] = {}
    rest: list[str] = []
    for name in names:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        (rest if prefix is None else groups.setdefault(prefix, [])).append(name)
    readings: dict[str, Reading] = {}
    for prefix, members in groups.items():
        reading = _read(file, PREFIXES[prefix], prefix, members)
        if reading is None or reading.name in readings:
            rest += members
        else:
            readings[reading.name] = reading
    if rest and (alone := _alone(rest)) is not None and alone not in readings:
        members = [name for name in rest if _belongs(alone, name)]
        reading = _read(file, alone, "", members)
        if reading is not None:
            reading = replace(reading, name=_tower(reading.spec)) if isinstance(reading.spec, TextSpec) else reading
            readings[reading.name] = reading
            rest = [name for name in rest if not _belongs(alone, name)]
    return readings, tuple(sorted(rest))


def finish(reading: Reading, file: ModelFile, family: Family | None) -> Component | str:
    """The component with what its family or its config adds to its spec; or, as text, why it cannot be used."""
    if reading.trouble:
        return reading.trouble
    try:
        spec = _with_family(reading, family, config(file, reading))
    except ModelError as error:
        return str(error)
    pooled = family.text.pooled if family is not None and family.text is not None else None
    if reading.name == pooled and isinstance(spec, TextSpec) and spec.projection is None:
        return "text_projection is missing, which makes the pooled vector"
    checked = "none missing" if spec is not None else "not checked, as this network is not built yet"
    return Component(
        name=reading.name,
        prefix=reading.prefix,
        spec=spec,
        layout=reading.layout,
        dtype=_dtype(reading, file),
        evidence=f"{reading.count} tensors under {reading.prefix or 'no prefix'}, {reading.layout} names, {checked}",
        rules=reading.rules,
        origins=reading.plan.origins,
    )


def _alone(names: Iterable[str]) -> str | None:
    """The component that a file without prefixes is, by the names that most of its tensors have."""
    votes = Counter(part for name in names for part in ("unet", "vae", "text_encoder") if _belongs(part, name))
    return max(votes, key=lambda part: votes[part]) if votes else None


def _tower(spec: TextSpec) -> str:
    """Which encoder a text tower without a prefix is: the second where only a second one has its size."""
    places = [place for family in FAMILIES for place in family.places]
    sizes = {(p.spec.width, p.spec.layers): p.component for p in places if isinstance(p.spec, TextSpec)}
    return sizes.get((spec.width, spec.layers), "text_encoder")


def _belongs(component: str, name: str) -> bool:
    first, _, rest = name.partition(".")
    second = rest.partition(".")[0]
    if component == "unet":
        return first in _UNET_HEADS or first in _FOLDER_UNET_HEADS or first in _FOLDER_UNET_ENDS
    if component == "vae":
        return first in ("quant_conv", "post_quant_conv") or (first in ("encoder", "decoder") and second in _VAE_PARTS)
    return text_layout([name]) is not None or first in _TEXT_STRAYS


def _read(file: ModelFile, component: str, prefix: str, names: list[str]) -> Reading | None:
    """`names`, all under `prefix`, as `component`; None where they are not in any layout of it."""
    shapes: dict[str, Shape] = {name: file.tensors[name].shape for name in names}
    video = component == "image_encoder" or any(mark in name for name in names for mark in _VIDEO)
    reading = Reading(component, prefix, "unreadable", (), Plan({}, {}, ()), video=video)
    try:
        layout, rules = _layout(component, [name[len(prefix) :] for name in names], video)
        if not rules:
            return None
        rules = under(prefix, rules)
        found = plan(rules, names)
        reading = Reading(component, prefix, layout, rules, found, surplus=found.unnamed, video=video)
        moved = {name: origin.shape(shapes) for name, origin in found.origins.items()}
        return reading if video else _measure(reading, moved)
    except ModelError as error:
        return replace(reading, trouble=str(error))


def _layout(component: str, names: list[str], video: bool) -> tuple[str, tuple[Rule, ...]]:
    """The name of the layout that `names` are in and its table, which is empty where they are in none."""
    if component.startswith("text_encoder"):
        return text_layout(names) or ("", ())
    if component == "image_encoder":
        return vision_layout(names) or ("", ())
    if component == "unet" and not _FOLDER_UNET_HEADS.isdisjoint(name.partition(".")[0] for name in names):
        return "diffusers", (video_unet_rules if video else unet_rules)(*unet_topology(names))
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in names):
        levels, old_attention = vae_topology(names)
        return "diffusers", video_vae_rules(levels) if video else vae_rules(levels, old_attention)
    return "original", _SAME


def _measure(reading: Reading, shapes: Mapping[str, Shape]) -> Reading:
    """`reading` with the spec that its shapes, by the network's names, tell, and what they lack of it.

    ModelError says what cannot be told.
    """
    if reading.name == "unet":
        spec = unet_spec(shapes)
        wanted = unet_shapes(spec)
    elif reading.name.startswith("text_encoder"):
        spec = text_spec(shapes, "gelu" if reading.layout == "openclip" else "quick_gelu")
        wanted = text_shapes(spec)
    else:
        spec = vae_spec(shapes)
        wanted = vae_shapes(spec)
    surplus = sorted(set(shapes) - set(wanted))
    sources = {source for name in surplus for source in reading.plan.origins[name].sources}
    origins = {name: reading.plan.origins[name] for name in wanted if name in shapes}
    return replace(
        reading,
        spec=spec,
        plan=replace(reading.plan, origins=origins),
        surplus=(*reading.surplus, *sorted(sources)),
        trouble=_trouble(shapes, wanted, surplus),
    )


def _trouble(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape], surplus: list[str]) -> str:
    """What keeps these shapes from being a network of the wanted ones; "" if nothing does."""
    missing = [name for name in wanted if name not in shapes]
    wrong = [name for name in wanted if name in shapes and shapes[name] != wanted[name]]
    parts = list[str]()
    if missing:
        parts.append(f"{len(missing)} of {len(wanted)} tensors are missing, the first is {missing[0]}")
    if wrong:
        name = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        parts.append(f"{name} has shape {list(shapes[name])} where the others ask for {list(wanted[name])}{more}")
    if parts and surplus:
        parts.append(f"{len(surplus)} tensors are too many, the first is {printable(surplus[0])}")
    return "; ".join(parts)


def config(file: ModelFile, reading: Reading) -> Mapping[str, Any]:
    """The component's `config.json`, where the file is a folder; else nothing."""
    found = file.extra.get(f"{reading.prefix}config.json")
    return found if isinstance(found, Mapping) else {}


def _with_family(reading: Reading, family: Family | None, config: Mapping[str, Any]) -> Spec | None:
    """The reading's spec with what shapes do not tell: from the family, and over that from a folder's config."""
    known = family.spec(reading.name) if family is not None else None
    spec = reading.spec
    if isinstance(spec, UNetSpec):
        if isinstance(known, UNetSpec):
            spec = replace(spec, heads=known.heads, head_channels=known.head_channels)
        return parted(unet_heads(spec, config))
    if isinstance(spec, TextSpec):
        if isinstance(known, TextSpec):
            spec = replace(spec, activation=known.activation)
        return text_config(spec, config)
    return spec


def _dtype(reading: Reading, file: ModelFile) -> Fact[str]:
    """The dtype of the component's tensors; of several, all of them, the commonest first."""
    sources = {source for origin in reading.plan.origins.values() for source in origin.sources}
    counts = Counter(file.tensors[source].dtype for source in sources).most_common()
    evidence = "tensors of each: " + ", ".join(f"{dtype} {count}" for dtype, count in counts)
    return Fact(" + ".join(dtype for dtype, _ in counts), evidence, "certain")

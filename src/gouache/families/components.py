"""Finds the components in a file: which tensors each has, in which layout, and whether it is complete.

A component is recognised by its prefix in single files and folders or, if it is alone in a file, by its tensor names.
Its names are translated by a table of `layouts`, its spec is read from its shapes, and the shapes that this spec
requires are compared with those in the file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gouache.errors import ModelError, printable
from gouache.families.catalog import FAMILIES
from gouache.families.family import Family, Spec
from gouache.families.found import Component, Fact
from gouache.families.shapes import (
    check_heads_divide,
    distilled,
    text_config,
    text_spec,
    unet_heads,
    unet_spec,
    vae_spec,
)
from gouache.files.record import FLOATS, FP8, ModelFile
from gouache.layouts.diffusers import HYBRID_VAE, unet_rules, unet_topology, vae_rules, vae_topology
from gouache.layouts.diffusers_video import video_unet_rules, video_vae_rules
from gouache.layouts.original import text_shapes, unet_shapes, vae_shapes
from gouache.layouts.rules import Plan, Rename, Rule, Shape, plan, under
from gouache.layouts.text import text_layout
from gouache.layouts.vision import vision_layout
from gouache.nn.spec import TextSpec, UNetSpec

PREFIXES: dict[str, str] = {
    **{location.prefix: location.component for family in FAMILIES for location in family.locations},
    **{f"{name}/": name for name in ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder")},
    "diffusion_model.": "unet",  # U-Nets saved alone by ComfyUI
    "vae.": "vae",
    # Forge's checkpoints: each encoder is a Transformers model inside a module of its own.
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.clip_h.transformer.": "text_encoder",
}
"""Prefix of tensor names -> component. No prefix begins with another one."""
_OPENCLIP_FORGE = re.compile(r"text_encoders\.clip_[gh]\.(?:model\.)?(?=transformer\.resblocks\.|token_embedding\.|"
                             r"positional_embedding$|ln_final\.|text_projection$|logit_scale$|attn_mask$)")  # fmt: skip


def prefix_of(name: str) -> str:
    """The prefix of the component that the tensor `name` belongs to; "" if it has none."""
    if name.startswith("text_encoders.") and (match := _OPENCLIP_FORGE.match(name)) is not None:
        return match[0]
    return next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")


def _component_of(prefix: str) -> str:
    forge = "text_encoder_2" if ".clip_g." in prefix else "text_encoder"
    return PREFIXES.get(prefix, forge)


_SAME: tuple[Rule, ...] = (Rename("{name*}", "{name*}"),)
_UNET_HEADS = frozenset(("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out"))
_FOLDER_UNET_HEADS = frozenset(("down_blocks", "mid_block", "up_blocks", "time_embedding", "add_embedding"))
_FOLDER_UNET_ENDS = frozenset(("conv_in", "conv_out", "conv_norm_out"))
_VAE_PARTS = frozenset(("conv_in", "conv_out", "norm_out", "conv_norm_out")) | frozenset(
    ("down", "up", "mid", "down_blocks", "up_blocks", "mid_block")
)
_OTHER_CLIP_NAMES = frozenset(
    ("text_projection", "logit_scale", "attn_mask", "visual", "vision_model", "visual_projection")
)
_VIDEO = (".time_stack.", ".time_mixer.", "temporal")


@dataclass(frozen=True)
class Candidate:
    """A component as far as its own tensors determine it, before its family is known.

    `problem` is why it cannot be used, "" if it is complete. `unexpected` are tensors that the network does not have.
    """

    name: str
    prefix: str
    layout: str
    rules: tuple[Rule, ...]
    plan: Plan
    spec: Spec | None = None
    problem: str = ""
    unexpected: tuple[str, ...] = ()
    video: bool = False

    @property
    def count(self) -> int:
        """The number of tensors of the file that belong to it."""
        return len({source for origin in self.plan.origins.values() for source in origin.sources})


def read_components(file: ModelFile, names: Iterable[str]) -> tuple[dict[str, Candidate], tuple[str, ...]]:
    """The components that `names` of `file` form, complete or not, and the names that belong to none."""
    groups: dict[str, list[str]] = {}
    rest: list[str] = []
    for name in names:
        prefix = prefix_of(name)
        (rest if not prefix else groups.setdefault(prefix, [])).append(name)
    candidates: dict[str, Candidate] = {}
    for prefix, members in groups.items():
        candidate = _read(file, _component_of(prefix), prefix, members)
        if candidate is None or candidate.name in candidates:
            rest += members
        else:
            candidates[candidate.name] = candidate
    if rest and (alone := _alone(rest)) is not None and alone not in candidates:
        members = [name for name in rest if _belongs(alone, name)]
        candidate = _read(file, alone, "", members)
        if candidate is not None:
            candidate = (
                replace(candidate, name=_text_encoder_name(candidate.spec))
                if isinstance(candidate.spec, TextSpec)
                else candidate
            )
            candidates[candidate.name] = candidate
            rest = [name for name in rest if not _belongs(alone, name)]
    return candidates, tuple(sorted(rest))


def finish(candidate: Candidate, file: ModelFile, family: Family | None) -> Component | str:
    """The component, its spec completed by its family and its config; or, as text, why it cannot be used."""
    if candidate.problem:
        return candidate.problem
    try:
        spec = _with_family(candidate, family, config(file, candidate))
    except ModelError as error:
        return str(error)
    pooled = family.text.pooled if family is not None and family.text is not None else None
    if candidate.name == pooled and isinstance(spec, TextSpec) and spec.projection is None:
        return "text_projection is missing, which computes the pooled vector"
    checked = "none missing" if spec is not None else "not checked, because this network is not implemented yet"
    under = candidate.prefix or "no prefix"
    return Component(
        name=candidate.name,
        prefix=candidate.prefix,
        spec=spec,
        layout=candidate.layout,
        dtype=_dtype(candidate, file),
        evidence=f"{candidate.count} tensors under {under}, {candidate.layout} names, {checked}",
        rules=candidate.rules,
        origins=candidate.plan.origins,
    )


def _alone(names: Iterable[str]) -> str | None:
    """Which component a file without prefixes contains, decided by the majority of its tensor names."""
    votes = Counter(part for name in names for part in ("unet", "vae", "text_encoder") if _belongs(part, name))
    return max(votes, key=lambda part: votes[part]) if votes else None


def _text_encoder_name(spec: TextSpec) -> str:
    """The component name of a text encoder without a prefix: the second where only a second one has its size."""
    locations = [location for family in FAMILIES for location in family.locations]
    sizes = {
        (each.spec.width, each.spec.layers): each.component for each in locations if isinstance(each.spec, TextSpec)
    }
    return sizes.get((spec.width, spec.layers), "text_encoder")


def _belongs(component: str, name: str) -> bool:
    first, _, rest = name.partition(".")
    second = rest.partition(".")[0]
    if component == "unet":
        return first in _UNET_HEADS or first in _FOLDER_UNET_HEADS or first in _FOLDER_UNET_ENDS
    if component == "vae":
        return first in ("quant_conv", "post_quant_conv") or (first in ("encoder", "decoder") and second in _VAE_PARTS)
    return text_layout([name]) is not None or first in _OTHER_CLIP_NAMES


def _read(file: ModelFile, component: str, prefix: str, names: list[str]) -> Candidate | None:
    """Reads `names`, all under `prefix`, as `component`; None if they are in none of its layouts."""
    shapes: dict[str, Shape] = {name: file.tensors[name].shape for name in names}
    video = component == "image_encoder" or any(mark in name for name in names for mark in _VIDEO)
    candidate = Candidate(component, prefix, "unreadable", (), Plan({}, {}, ()), video=video)
    try:
        layout, rules = _layout(component, [name[len(prefix) :] for name in names], video)
        if not rules:
            return None
        rules = under(prefix, rules)
        found = plan(rules, names)
        candidate = Candidate(component, prefix, layout, rules, found, unexpected=found.unnamed, video=video)
        moved = {name: origin.shape(shapes) for name, origin in found.origins.items()}
        measured = candidate if video else _measure(candidate, moved)
        return replace(measured, problem=_quantised(file, measured) or measured.problem)
    except ModelError as error:
        return replace(candidate, problem=_quantised(file, candidate) or str(error))


def _quantised(file: ModelFile, candidate: Candidate) -> str:
    """Why the stored weights of `candidate` are codes of an unknown quantisation and not numbers; "" if they are not.

    Such codes would give noise, or raise an error of PyTorch in the middle of painting.
    """
    sources = {source for origin in candidate.plan.origins.values() for source in origin.sources}
    dtypes = {name: file.tensors[name].dtype for name in sources}
    codes = sorted(name for name, dtype in dtypes.items() if dtype not in FLOATS)
    if codes:
        kinds = ", ".join(sorted({dtypes[name] for name in codes}))
        first = printable(codes[0])
        return f"{len(codes)} of its tensors are stored as {kinds}, a quantisation that is not supported: {first}, ..."
    modules = {
        name.removesuffix("weight") for name, dtype in dtypes.items() if dtype in FP8 and name.endswith(".weight")
    }
    for name in candidate.unexpected if modules else ():
        stem = name.rpartition(".")[0]
        if f"{stem}." in modules or f"{stem.rpartition('.')[0]}." in modules:
            return f"its fp8 weights have tensors beside them that are no known scales, such as {printable(name)}"
    return ""


def _layout(component: str, names: list[str], video: bool) -> tuple[str, tuple[Rule, ...]]:
    """The name of the layout of `names` and its table; the table is empty if no layout matches."""
    if component.startswith("text_encoder"):
        return text_layout(names) or ("", ())
    if component == "image_encoder":
        return vision_layout(names) or ("", ())
    if component == "unet" and not _FOLDER_UNET_HEADS.isdisjoint(name.partition(".")[0] for name in names):
        return "diffusers", (video_unet_rules if video else unet_rules)(*unet_topology(names))
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in names):
        levels, old_attention = vae_topology(names)
        return "diffusers", video_vae_rules(levels) if video else vae_rules(levels, old_attention)
    return "original", (*HYBRID_VAE, *_SAME) if component == "vae" and not video else _SAME


_DISTILLED = "this is a distilled U-Net, which is not supported yet: "


def _measure(candidate: Candidate, shapes: Mapping[str, Shape]) -> Candidate:
    """`candidate` with the spec read from `shapes` (by the network's names), and with what is missing or unexpected.

    Raises ModelError if the shapes do not determine a spec.
    """
    if candidate.name == "unet":
        try:
            spec = unet_spec(shapes)
        except ModelError:
            if lacks := distilled(shapes):
                raise ModelError(_DISTILLED + lacks) from None
            raise
        expected = unet_shapes(spec)
    elif candidate.name.startswith("text_encoder"):
        spec = text_spec(shapes, "gelu" if candidate.layout == "openclip" else "quick_gelu")
        expected = text_shapes(spec)
    else:
        spec = vae_spec(shapes)
        expected = vae_shapes(spec)
    unexpected = sorted(set(shapes) - set(expected))
    sources = {source for name in unexpected for source in candidate.plan.origins[name].sources}
    origins = {name: candidate.plan.origins[name] for name in expected if name in shapes}
    problem = _problem(shapes, expected, unexpected)
    if problem and candidate.name == "unet" and (lacks := distilled(shapes)):
        problem = _DISTILLED + lacks
    return replace(
        candidate,
        spec=spec,
        plan=replace(candidate.plan, origins=origins),
        unexpected=(*candidate.unexpected, *sorted(sources)),
        problem=problem,
    )


def _problem(shapes: Mapping[str, Shape], expected: Mapping[str, Shape], unexpected: list[str]) -> str:
    """How these shapes differ from the expected ones; "" if the network is complete."""
    missing = [name for name in expected if name not in shapes]
    wrong = [name for name in expected if name in shapes and shapes[name] != expected[name]]
    parts = list[str]()
    if missing:
        if len(missing) == 1:
            parts.append(f"1 of {len(expected)} tensors is missing: {missing[0]}")
        else:
            parts.append(f"{len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}")
    if wrong:
        name = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        parts.append(f"{name} has shape {list(shapes[name])}, but the others require {list(expected[name])}{more}")
    if parts and unexpected:
        if len(unexpected) == 1:
            parts.append(f"1 tensor is unexpected: {printable(unexpected[0])}")
        else:
            parts.append(f"{len(unexpected)} tensors are unexpected, the first is {printable(unexpected[0])}")
    return "; ".join(parts)


def config(file: ModelFile, candidate: Candidate) -> Mapping[str, Any]:
    """The component's `config.json` if the file is a folder; else an empty mapping."""
    found = file.extra.get(f"{candidate.prefix}config.json")
    return found if isinstance(found, Mapping) else {}


def _with_family(candidate: Candidate, family: Family | None, config: Mapping[str, Any]) -> Spec | None:
    """The spec of `candidate` with what shapes do not determine: from the family, overridden by a folder's config."""
    known = family.spec(candidate.name) if family is not None else None
    spec = candidate.spec
    if isinstance(spec, UNetSpec):
        if isinstance(known, UNetSpec):
            spec = replace(spec, heads=known.heads, head_channels=known.head_channels)
        return check_heads_divide(unet_heads(spec, config))
    if isinstance(spec, TextSpec):
        if isinstance(known, TextSpec):
            spec = replace(spec, activation=known.activation)
        return text_config(spec, config)
    return spec


def _dtype(candidate: Candidate, file: ModelFile) -> Fact[str]:
    """The dtypes of the component's tensors, joined by " + ", the most frequent first."""
    sources = {source for origin in candidate.plan.origins.values() for source in origin.sources}
    counts = Counter(file.tensors[source].dtype for source in sources).most_common()
    evidence = "number of tensors: " + ", ".join(f"{dtype} {count}" for dtype, count in counts)
    return Fact(" + ".join(dtype for dtype, _ in counts), evidence, "certain")

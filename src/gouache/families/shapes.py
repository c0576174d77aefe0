"""Derives the spec of a network from the shapes of its tensors.

Shapes determine all widths and depths, so a narrower network of the same topology is read like the released one. They
do not determine the number of attention heads, nor the activation of a text encoder: these come from the family or
from a folder's config.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from gouache.errors import ModelError, printable
from gouache.layouts.rules import Shape
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec, VisionSpec

_MAX_SEGMENTS = 6  # of a module path that is counted: input_blocks.4.1.transformer_blocks.0 has 5
_MAX_MODULES = 64  # numbered modules under one path; released networks have at most 32


def unet_spec(shapes: Mapping[str, Shape]) -> UNetSpec:
    """The spec of a U-Net from its tensors under the original names. Raises ModelError if it is not determined.

    Heads follow from the type of `proj_in`, as in every released line: 8 heads with convolutions (SD1), heads of 64
    channels with linear layers (SD2, SDXL).
    """
    modules = _modules(shapes)
    channels, in_channels = _shape(shapes, "input_blocks.0.0.weight", 4)[:2]
    widths, depths, blocks = list[int](), list[int](), [0]
    for number in range(1, _count(modules, "input_blocks")):
        block = f"input_blocks.{number}"
        if f"{block}.0.op" in modules:
            blocks.append(0)
            continue
        if not blocks[-1]:
            widths.append(_shape(shapes, f"{block}.0.out_layers.3.weight", 4)[0])
            depths.append(_count(modules, f"{block}.1.transformer_blocks"))
        blocks[-1] += 1
    if len(set(blocks)) != 1:
        raise ModelError(f"its levels have {blocks} residual blocks: no known family has this topology")
    linear = len(_any(shapes, "proj_in.weight")) == 2
    return UNetSpec(
        in_channels=in_channels,
        out_channels=_shape(shapes, "out.2.weight", 4)[0],
        channels=channels,
        channel_mult=_multiples(widths, channels),
        res_blocks=blocks[0],
        attention_depth=tuple(depths),
        middle_depth=_count(modules, "middle_block.1.transformer_blocks"),
        heads=None if linear else 8,
        head_channels=64 if linear else None,
        context_dim=_any(shapes, "attn2.to_k.weight")[1],
        linear_projection=linear,
        vector_channels=_shape(shapes, "label_emb.0.0.weight", 2)[1] if "label_emb" in modules else 0,
    )


def distilled(shapes: Mapping[str, Shape]) -> str:
    """What this U-Net (under the original names) lacks if it is one of the distilled ones; "" if it is not.

    Distillation removes whole modules, so that a file in which single tensors are missing is none of these.
    """
    modules = _modules(shapes)
    if "input_blocks.0" not in modules or "output_blocks.0" not in modules:
        return ""
    if "middle_block" not in modules:
        return "it has no middle block, as in SDXS, BK-SDM-Small and Tiny-SD"
    if "middle_block.0" in modules and "middle_block.2" not in modules:
        return "its middle block has one residual instead of two, as in SSD-1B"
    depths: dict[int, set[int]] = {}
    level = 0
    for number in range(1, _count(modules, "input_blocks")):
        level += f"input_blocks.{number}.0.op" in modules
        if f"input_blocks.{number}.1.transformer_blocks" in modules:
            depths.setdefault(level, set()).add(_count(modules, f"input_blocks.{number}.1.transformer_blocks"))
    for number in range(_count(modules, "output_blocks")):
        block = f"output_blocks.{number}"
        if f"{block}.1.transformer_blocks" in modules:
            depths.setdefault(level, set()).add(_count(modules, f"{block}.1.transformer_blocks"))
        level -= f"{block}.1.conv" in modules or f"{block}.2.conv" in modules
    uneven = next((found for found in depths.values() if len(found) > 1), None)
    if uneven is None:
        return ""
    listed = " and ".join(map(str, sorted(uneven)))
    return f"transformers of one level have {listed} blocks, as in SSD-1B and Segmind-Vega"


def vae_spec(shapes: Mapping[str, Shape]) -> VaeSpec:
    """The spec of an autoencoder from its tensors under the original names. Raises ModelError if not determined."""
    modules = _modules(shapes)
    channels, image_channels = _shape(shapes, "encoder.conv_in.weight", 4)[:2]
    levels = range(_count(modules, "encoder.down"))
    widths = [_shape(shapes, f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in levels]
    return VaeSpec(
        channels=channels,
        channel_mult=_multiples(widths, channels),
        res_blocks=_count(modules, "encoder.down.0.block"),
        latent_channels=_shape(shapes, "decoder.conv_in.weight", 4)[1],
        image_channels=image_channels,
    )


def text_spec(shapes: Mapping[str, Shape], activation: str) -> TextSpec:
    """The spec of a text encoder from its tensors under Transformers names. Raises ModelError if not determined.

    Heads have 64 channels, as in every CLIP.
    """
    vocabulary, width = _shape(shapes, "text_model.embeddings.token_embedding.weight", 2)
    projects = "text_projection.weight" in shapes
    return TextSpec(
        width=width,
        layers=_count(_modules(shapes), "text_model.encoder.layers"),
        heads=max(1, width // 64),
        mlp_width=_shape(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        vocabulary=vocabulary,
        positions=_shape(shapes, "text_model.embeddings.position_embedding.weight", 2)[0],
        activation=activation,
        projection=_shape(shapes, "text_projection.weight", 2)[0] if projects else None,
    )


def vision_spec(shapes: Mapping[str, Shape]) -> VisionSpec:
    """The spec of OpenCLIP's image encoder from its tensors under Transformers names. Raises ModelError if incomplete.

    Heads have 80 channels and the activation is GELU with erf, as in ViT-H/14, the only one in a released line.
    """
    width, _, _, patch = _shape(shapes, "vision_model.embeddings.patch_embedding.weight", 4)
    if not patch:
        raise ModelError("its patches are 0 pixels wide")
    positions = _shape(shapes, "vision_model.embeddings.position_embedding.weight", 2)[0]
    return VisionSpec(
        width=width,
        layers=_count(_modules(shapes), "vision_model.encoder.layers"),
        heads=max(1, width // 80),
        mlp_width=_shape(shapes, "vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        image_size=patch * math.isqrt(max(0, positions - 1)),  # a position per patch, and one for the class token
        patch_size=patch,
        activation="gelu",
        projection=_shape(shapes, "visual_projection.weight", 2)[0],
    )


def unet_heads(spec: UNetSpec, config: Mapping[str, Any]) -> UNetSpec:
    """`spec` with the heads that a diffusers config states. Raises ModelError if they do not fit this U-Net.

    The config states the number of heads, one for all levels or one per level, in a field named `attention_head_dim`.
    """
    stated = config.get("num_attention_heads") or config.get("attention_head_dim")
    if stated is None:
        return spec
    levels = len(spec.channel_mult)
    heads = [stated] * levels if isinstance(stated, int) else stated
    if not isinstance(heads, list) or len(heads) != levels or not all(isinstance(n, int) and n > 0 for n in heads):
        raise ModelError(f"its config.json states {_short(stated)} attention heads for a U-Net with {levels} levels")
    attending = [level for level, depth in enumerate(spec.attention_depth) if depth] + [levels - 1]
    if len({heads[level] for level in attending}) == 1:
        return replace(spec, heads=heads[-1], head_channels=None)
    each = {spec.channels * spec.channel_mult[level] // heads[level] for level in attending}
    if len(each) == 1:
        return replace(spec, heads=None, head_channels=each.pop())
    raise ModelError(f"its config.json states {stated} heads: levels differ in both their number and their width")


def check_heads_divide(spec: UNetSpec) -> UNetSpec:
    """`spec` unchanged, if its heads divide the width of every level with attention; else raises ModelError."""
    attending = [level for level, depth in enumerate(spec.attention_depth) if depth] + [len(spec.channel_mult) - 1]
    for level in attending:
        width, share = spec.channels * spec.channel_mult[level], spec.heads or spec.head_channels or 1
        if width % share:
            heads = f"{share} heads" if spec.heads else f"heads of {share} channels"
            raise ModelError(f"level {level} has width {width}, which is not divisible into {heads}")
    return spec


def text_config(spec: TextSpec, config: Mapping[str, Any]) -> TextSpec:
    """`spec` with the heads and the activation that a Transformers config states. Raises ModelError if invalid."""
    heads, activation = config.get("num_attention_heads", spec.heads), config.get("hidden_act", spec.activation)
    if not isinstance(heads, int) or heads < 1 or spec.width % heads:
        raise ModelError(f"its config.json states {_short(heads)} attention heads for a width of {spec.width}")
    if activation not in ("quick_gelu", "gelu"):
        raise ModelError(f"its config.json states the activation {_short(activation)}, expected quick_gelu or gelu")
    return replace(spec, heads=heads, activation=activation)


def _short(value: Any) -> str:
    return printable(repr(value), 60)


def _modules(names: Iterable[str]) -> frozenset[str]:
    """Every dotted path of up to `_MAX_SEGMENTS` segments that is a prefix of one of `names`."""
    paths = set[str]()
    for name in names:
        end = -1
        for _ in range(_MAX_SEGMENTS):
            end = name.find(".", end + 1)
            if end < 0:
                break
            paths.add(name[:end])
    return frozenset(paths)


def _count(modules: frozenset[str], path: str) -> int:
    """The number of numbered modules under `path`, counted from 0 without a gap. Raises ModelError for too many.

    The limit is needed because depths multiply when all expected names are listed.
    """
    count = 0
    while f"{path}.{count}" in modules:
        count += 1
        if count > _MAX_MODULES:
            raise ModelError(f"it has more than {_MAX_MODULES} modules under {path}")
    return count


def _shape(shapes: Mapping[str, Shape], name: str, rank: int) -> Shape:
    if name not in shapes:
        raise ModelError(f"{name} is missing")
    if len(shapes[name]) != rank:
        raise ModelError(f"{name} has shape {list(shapes[name])}, expected {rank} dimensions")
    return shapes[name]


def _any(shapes: Mapping[str, Shape], ending: str) -> Shape:
    """The shape of the first tensor with at least two dimensions whose name ends in `ending`."""
    for name, shape in shapes.items():
        if name.endswith(ending) and len(shape) >= 2:
            return shape
    raise ModelError(f"no tensor name ends in {ending}: it has no cross-attention")


def _multiples(widths: Iterable[int], channels: int) -> tuple[int, ...]:
    widths = list(widths)
    if not channels or any(width % channels for width in widths):
        raise ModelError(f"its levels have the widths {widths}, not multiples of the first convolution's {channels}")
    return tuple(width // channels for width in widths)

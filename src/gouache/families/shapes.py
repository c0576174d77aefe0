"""From the shapes of a network's tensors to the numbers it is built from.

Shapes tell all widths and depths, so a narrower network of the same topology is read like the released one. They do
not tell the number of attention heads, nor the text tower's activation: those are the family's, or a folder's config.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from gouache.errors import ModelError, printable
from gouache.layouts.rules import Shape
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec, VisionSpec

_DEEPEST = 6  # segments of a path that is counted: input_blocks.4.1.transformer_blocks.0
_MOST = 64  # modules in a row; released networks have 32 at most


def unet_spec(shapes: Mapping[str, Shape]) -> UNetSpec:
    """The spec of a U-Net from its tensors under the original names; ModelError says what cannot be told.

    Heads follow the projections, as they do in every released line: 8 with convolutions (SD1), 64 channels each with
    linear layers (SD2, SDXL).
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
        raise ModelError(f"its levels have {blocks} residual blocks: a topology of no known family")
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


def vae_spec(shapes: Mapping[str, Shape]) -> VaeSpec:
    """The spec of an autoencoder from its tensors under the original names; ModelError says what cannot be told."""
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
    """The spec of a text tower from its tensors under Transformers names; ModelError says what cannot be told.

    A head is 64 wide, as in every CLIP.
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
    """The spec of OpenCLIP's image tower from its tensors under Transformers names; ModelError: what cannot be told.

    A head is 80 wide and the activation the erf form, as in ViT-H/14, the one tower that a released line has.
    """
    width, _, _, patch = _shape(shapes, "vision_model.embeddings.patch_embedding.weight", 4)
    if not patch:
        raise ModelError("its patches are 0 pixels wide")
    places = _shape(shapes, "vision_model.embeddings.position_embedding.weight", 2)[0]
    return VisionSpec(
        width=width,
        layers=_count(_modules(shapes), "vision_model.encoder.layers"),
        heads=max(1, width // 80),
        mlp_width=_shape(shapes, "vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        image_size=patch * math.isqrt(max(0, places - 1)),  # a place for each patch, and one for the class token
        patch_size=patch,
        activation="gelu",
        projection=_shape(shapes, "visual_projection.weight", 2)[0],
    )


def unet_heads(spec: UNetSpec, config: Mapping[str, Any]) -> UNetSpec:
    """`spec` with the heads that a diffusers config states; ModelError where they cannot be those of this U-Net.

    It states numbers of heads, one for all levels or one each, in a field that it calls `attention_head_dim`.
    """
    stated = config.get("num_attention_heads") or config.get("attention_head_dim")
    if stated is None:
        return spec
    levels = len(spec.channel_mult)
    heads = [stated] * levels if isinstance(stated, int) else stated
    if not isinstance(heads, list) or len(heads) != levels or not all(isinstance(n, int) and n > 0 for n in heads):
        raise ModelError(f"its config.json states {_short(stated)} attention heads for a U-Net of {levels} levels")
    attending = [level for level, depth in enumerate(spec.attention_depth) if depth] + [levels - 1]
    if len({heads[level] for level in attending}) == 1:
        return replace(spec, heads=heads[-1], head_channels=None)
    each = {spec.channels * spec.channel_mult[level] // heads[level] for level in attending}
    if len(each) == 1:
        return replace(spec, heads=None, head_channels=each.pop())
    raise ModelError(f"its config.json states {stated} heads: neither their number nor their width is the same")


def parted(spec: UNetSpec) -> UNetSpec:
    """`spec`, if its widths can be parted into its heads; else ModelError."""
    attending = [level for level, depth in enumerate(spec.attention_depth) if depth] + [len(spec.channel_mult) - 1]
    for level in attending:
        width, share = spec.channels * spec.channel_mult[level], spec.heads or spec.head_channels or 1
        if width % share:
            heads = f"{share} heads" if spec.heads else f"heads of {share} channels"
            raise ModelError(f"level {level} is {width} wide, which cannot be parted into {heads}")
    return spec


def text_config(spec: TextSpec, config: Mapping[str, Any]) -> TextSpec:
    """`spec` with the heads and the activation that a Transformers config states; ModelError if they cannot be."""
    heads, activation = config.get("num_attention_heads", spec.heads), config.get("hidden_act", spec.activation)
    if not isinstance(heads, int) or heads < 1 or spec.width % heads:
        raise ModelError(f"its config.json states {_short(heads)} attention heads for a width of {spec.width}")
    if activation not in ("quick_gelu", "gelu"):
        raise ModelError(f"its config.json states the activation {_short(activation)}; known are quick_gelu and gelu")
    return replace(spec, heads=heads, activation=activation)


def _short(value: Any) -> str:
    return printable(repr(value), 60)


def _modules(names: Iterable[str]) -> frozenset[str]:
    """Every dotted path of up to `_DEEPEST` segments that leads to one of `names`."""
    paths = set[str]()
    for name in names:
        end = -1
        for _ in range(_DEEPEST):
            end = name.find(".", end + 1)
            if end < 0:
                break
            paths.add(name[:end])
    return frozenset(paths)


def _count(modules: frozenset[str], path: str) -> int:
    """How many numbered modules stand under `path`, counted from 0 without a gap; ModelError beyond reason.

    Depths multiply when the names they ask for are written out, so a file may not state them at will.
    """
    count = 0
    while f"{path}.{count}" in modules:
        count += 1
        if count > _MOST:
            raise ModelError(f"more than {_MOST} modules stand under {path}")
    return count


def _shape(shapes: Mapping[str, Shape], name: str, rank: int) -> Shape:
    if name not in shapes:
        raise ModelError(f"{name} is missing")
    if len(shapes[name]) != rank:
        raise ModelError(f"{name} has shape {list(shapes[name])}, expected {rank} dimensions")
    return shapes[name]


def _any(shapes: Mapping[str, Shape], ending: str) -> Shape:
    """The shape of the first tensor that ends so, of at least two dimensions."""
    for name, shape in shapes.items():
        if name.endswith(ending) and len(shape) >= 2:
            return shape
    raise ModelError(f"nothing in it ends in {ending}: it has no attention to the prompt")


def _multiples(widths: Iterable[int], channels: int) -> tuple[int, ...]:
    widths = list(widths)
    if not channels or any(width % channels for width in widths):
        raise ModelError(f"its levels are {widths} wide, not multiples of the first convolution's {channels}")
    return tuple(width // channels for width in widths)

"""The tensor names and shapes of Stable Video Diffusion's networks, generated from their specs without building them.

U-Net and decoder are those of Stable Diffusion, with a temporal layer for each spatial one; the image encoder is
CLIP's, under Transformers' names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from gouache.layouts.original import unet_shapes, vae_shapes
from gouache.layouts.rules import Shape
from gouache.nn.spec import UNetSpec, VaeSpec, VisionSpec

NamedShapes: TypeAlias = Iterator[tuple[str, Shape]]


def video_unet_shapes(spec: UNetSpec) -> dict[str, Shape]:
    """Every tensor under `model.diffusion_model.`."""
    shapes = unet_shapes(spec)
    time = 4 * spec.channels
    for name, (width, *_) in list(shapes.items()):
        if block := _before(".out_layers.0.weight", name):
            shapes |= dict(_residual(f"{block}.time_stack", width))
            shapes |= dict(_layer(f"{block}.time_stack.emb_layers.1", width, time))
            shapes[f"{block}.time_mixer.mix_factor"] = (1,)
        elif transformer := _before(".proj_in.weight", name):
            shapes |= dict(_layer(f"{transformer}.time_pos_embed.0", 4 * width, width))
            shapes |= dict(_layer(f"{transformer}.time_pos_embed.2", width, 4 * width))
            shapes[f"{transformer}.time_mixer.mix_factor"] = (1,)
        elif block := _before(".norm3.weight", name):
            shapes |= dict(_block(block.replace("transformer_blocks", "time_stack"), width, spec.context_dim))
    return shapes


def video_vae_shapes(spec: VaeSpec) -> dict[str, Shape]:
    """The `encoder` and `quant_conv` of one autoencoder and the `decoder` of another; see `video_vae_rules`."""
    shapes = {name: shape for name, shape in vae_shapes(spec).items() if not name.startswith("post_quant_conv.")}
    for name, (width, *_) in list(shapes.items()):
        block = _before(".norm2.weight", name)
        if block.startswith("decoder."):
            shapes |= dict(_residual(f"{block}.time_stack", width))
            shapes[f"{block}.mix_factor"] = (1,)
    return shapes | dict(_layer("decoder.conv_out.time_mix_conv", spec.image_channels, spec.image_channels, 3, 1, 1))


def vision_shapes(spec: VisionSpec) -> dict[str, Shape]:
    """Every tensor of `ClipVision(spec)`."""
    return dict(_vision(spec))


def _before(ending: str, name: str) -> str:
    """The part of `name` before `ending`; "" if it does not end with it."""
    return name.removesuffix(ending) if name.endswith(ending) else ""


def _layer(name: str, *shape: int) -> NamedShapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _residual(name: str, width: int) -> NamedShapes:
    """A temporal residual block: convolutions over three frames that keep the width."""
    for norm, conv in (("in_layers.0", "in_layers.2"), ("out_layers.0", "out_layers.3")):
        yield from _layer(f"{name}.{norm}", width)
        yield from _layer(f"{name}.{conv}", width, width, 3, 1, 1)


def _block(name: str, width: int, context: int) -> NamedShapes:
    """A temporal transformer block; it has a feed-forward network before its attention as well as after it."""
    for attention, key_width in (("attn1", width), ("attn2", context)):
        yield f"{name}.{attention}.to_q.weight", (width, width)
        yield f"{name}.{attention}.to_k.weight", (width, key_width)
        yield f"{name}.{attention}.to_v.weight", (width, key_width)
        yield from _layer(f"{name}.{attention}.to_out.0", width, width)
    for feed_forward in ("ff_in", "ff"):
        yield from _layer(f"{name}.{feed_forward}.net.0.proj", 8 * width, width)
        yield from _layer(f"{name}.{feed_forward}.net.2", width, 4 * width)
    for norm in ("norm_in", "norm1", "norm2", "norm3"):
        yield from _layer(f"{name}.{norm}", width)


def _vision(spec: VisionSpec) -> NamedShapes:
    width, side = spec.width, spec.patch_size
    yield "vision_model.embeddings.class_embedding", (width,)
    yield "vision_model.embeddings.patch_embedding.weight", (width, 3, side, side)
    yield "vision_model.embeddings.position_embedding.weight", ((spec.image_size // side) ** 2 + 1, width)
    yield from _layer("vision_model.pre_layrnorm", width)
    for index in range(spec.layers):
        layer = f"vision_model.encoder.layers.{index}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _layer(f"{layer}.self_attn.{projection}", width, width)
        yield from _layer(f"{layer}.layer_norm1", width)
        yield from _layer(f"{layer}.mlp.fc1", spec.mlp_width, width)
        yield from _layer(f"{layer}.mlp.fc2", width, spec.mlp_width)
        yield from _layer(f"{layer}.layer_norm2", width)
    yield from _layer("vision_model.post_layernorm", width)
    if spec.projection is not None:
        yield "visual_projection.weight", (spec.projection, width)

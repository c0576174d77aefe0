"""The tensor names and shapes of the networks, generated from their specs without building them.

U-Net and autoencoder have the names of the original single files (CompVis, Stability AI), the text encoder those of
Transformers. So a file can be checked, and its missing tensors listed, before torch is imported. A test checks that
the networks have exactly these names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator

from gouache.layouts.rules import Shape
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec

NamedShapes = Iterator[tuple[str, Shape]]


def unet_shapes(spec: UNetSpec) -> dict[str, Shape]:
    """Every tensor of `UNet(spec)`."""
    return dict(_unet(spec))


def vae_shapes(spec: VaeSpec) -> dict[str, Shape]:
    """Every tensor of `Autoencoder(spec)`."""
    return dict(_vae(spec))


def text_shapes(spec: TextSpec) -> dict[str, Shape]:
    """Every tensor of `ClipText(spec)`."""
    return dict(_text(spec))


def _linear(name: str, width: int, out: int) -> NamedShapes:
    yield f"{name}.weight", (out, width)
    yield f"{name}.bias", (out,)


def _conv(name: str, width: int, out: int, size: int = 3) -> NamedShapes:
    yield f"{name}.weight", (out, width, size, size)
    yield f"{name}.bias", (out,)


def _pointwise(name: str, width: int, out: int) -> NamedShapes:
    return _conv(name, width, out, 1)


def _norm(name: str, width: int) -> NamedShapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _unet(spec: UNetSpec) -> NamedShapes:
    base, time = spec.channels, 4 * spec.channels
    widths = [base * mult for mult in spec.channel_mult]
    yield from _linear("time_embed.0", base, time)
    yield from _linear("time_embed.2", time, time)
    if spec.vector_channels:
        yield from _linear("label_emb.0.0", spec.vector_channels, time)
        yield from _linear("label_emb.0.2", time, time)

    yield from _conv("input_blocks.0.0", spec.in_channels, base)
    skips = [base]
    for level, width in enumerate(widths):
        for _ in range(spec.res_blocks):
            block = f"input_blocks.{len(skips)}"
            yield from _residual(f"{block}.0", skips[-1], width, time)
            yield from _transformer(f"{block}.1", width, spec.attention_depth[level], spec)
            skips.append(width)
        if level < len(widths) - 1:
            yield from _conv(f"input_blocks.{len(skips)}.0.op", width, width)
            skips.append(width)

    width = widths[-1]
    yield from _residual("middle_block.0", width, width, time)
    yield from _transformer("middle_block.1", width, spec.middle_depth, spec)
    yield from _residual("middle_block.2", width, width, time)

    number = 0
    before = widths[-1]
    for level, width in reversed(list(enumerate(widths))):
        depth = spec.attention_depth[level]
        for index in range(spec.res_blocks + 1):
            block = f"output_blocks.{number}"
            yield from _residual(f"{block}.0", before + skips.pop(), width, time)
            yield from _transformer(f"{block}.1", width, depth, spec)
            if level and index == spec.res_blocks:
                yield from _conv(f"{block}.{2 if depth else 1}.conv", width, width)
            before = width
            number += 1

    yield from _norm("out.0", base)
    yield from _conv("out.2", base, spec.out_channels)


def _residual(name: str, width: int, out: int, time: int) -> NamedShapes:
    yield from _norm(f"{name}.in_layers.0", width)
    yield from _conv(f"{name}.in_layers.2", width, out)
    yield from _linear(f"{name}.emb_layers.1", time, out)
    yield from _norm(f"{name}.out_layers.0", out)
    yield from _conv(f"{name}.out_layers.3", out, out)
    if width != out:
        yield from _conv(f"{name}.skip_connection", width, out, 1)


def _transformer(name: str, width: int, depth: int, spec: UNetSpec) -> NamedShapes:
    if not depth:
        return
    project = _linear if spec.linear_projection else _pointwise
    yield from _norm(f"{name}.norm", width)
    yield from project(f"{name}.proj_in", width, width)
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        for attention, context in (("attn1", width), ("attn2", spec.context_dim)):
            yield f"{block}.{attention}.to_q.weight", (width, width)
            yield f"{block}.{attention}.to_k.weight", (width, context)
            yield f"{block}.{attention}.to_v.weight", (width, context)
            yield from _linear(f"{block}.{attention}.to_out.0", width, width)
        yield from _linear(f"{block}.ff.net.0.proj", width, 8 * width)  # GEGLU: gate and value, 4 times each
        yield from _linear(f"{block}.ff.net.2", 4 * width, width)
        for norm in ("norm1", "norm2", "norm3"):
            yield from _norm(f"{block}.{norm}", width)
    yield from project(f"{name}.proj_out", width, width)


def _vae(spec: VaeSpec) -> NamedShapes:
    widths = [spec.channels * mult for mult in spec.channel_mult]
    latent, last = spec.latent_channels, len(widths) - 1

    yield from _conv("encoder.conv_in", spec.image_channels, spec.channels)
    before = spec.channels
    for level, width in enumerate(widths):
        for index in range(spec.res_blocks):
            yield from _vae_block(f"encoder.down.{level}.block.{index}", before, width)
            before = width
        if level < last:
            yield from _conv(f"encoder.down.{level}.downsample.conv", width, width)
    yield from _vae_middle("encoder", widths[-1])
    yield from _conv("encoder.conv_out", widths[-1], 2 * latent)

    yield from _conv("decoder.conv_in", latent, widths[-1])
    before = widths[-1]
    for level, width in reversed(list(enumerate(widths))):
        for index in range(spec.res_blocks + 1):
            yield from _vae_block(f"decoder.up.{level}.block.{index}", before, width)
            before = width
        if level:
            yield from _conv(f"decoder.up.{level}.upsample.conv", width, width)
    yield from _vae_middle("decoder", widths[-1], out=widths[0])
    yield from _conv("decoder.conv_out", widths[0], spec.image_channels)

    yield from _conv("quant_conv", 2 * latent, 2 * latent, 1)
    yield from _conv("post_quant_conv", latent, latent, 1)


def _vae_block(name: str, width: int, out: int) -> NamedShapes:
    yield from _norm(f"{name}.norm1", width)
    yield from _conv(f"{name}.conv1", width, out)
    yield from _norm(f"{name}.norm2", out)
    yield from _conv(f"{name}.conv2", out, out)
    if width != out:
        yield from _conv(f"{name}.nin_shortcut", width, out, 1)


def _vae_middle(side: str, width: int, out: int | None = None) -> NamedShapes:
    """The middle blocks of encoder or decoder, and the final norm; the decoder's has the finest level's width."""
    yield from _vae_block(f"{side}.mid.block_1", width, width)
    yield from _norm(f"{side}.mid.attn_1.norm", width)
    for layer in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{side}.mid.attn_1.{layer}", width, width, 1)
    yield from _vae_block(f"{side}.mid.block_2", width, width)
    yield from _norm(f"{side}.norm_out", out or width)


def _text(spec: TextSpec) -> NamedShapes:
    width = spec.width
    yield "text_model.embeddings.token_embedding.weight", (spec.vocabulary, width)
    yield "text_model.embeddings.position_embedding.weight", (spec.positions, width)
    for index in range(spec.layers):
        layer = f"text_model.encoder.layers.{index}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{projection}", width, width)
        yield from _norm(f"{layer}.layer_norm1", width)
        yield from _linear(f"{layer}.mlp.fc1", width, spec.mlp_width)
        yield from _linear(f"{layer}.mlp.fc2", spec.mlp_width, width)
        yield from _norm(f"{layer}.layer_norm2", width)
    yield from _norm("text_model.final_layer_norm", width)
    if spec.projection is not None:
        yield "text_projection.weight", (spec.projection, width)

"""Maps tensor names of U-Net and autoencoder in a diffusers folder to those of the original single files.

diffusers numbers blocks within levels, the original consecutively, so a table is generated for a number of levels, a
number of residual blocks per level, and the levels that have attention. Whether `proj_in` is a convolution or a
linear layer only affects its shape: both layouts store it as the network was built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

from gouache.errors import ModelError
from gouache.layouts.rules import AsConv, Rename, Rule

_MAX_BLOCKS = 16  # limit on levels, and on residual blocks per level; released U-Nets have 4 and 2

Block: TypeAlias = Literal["residual", "transformer", "resample"]

UNET_STEM: tuple[Rule, ...] = tuple(
    Rename(f"{old}.{{leaf}}", f"{new}.{{leaf}}")
    for old, new in {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }.items()
)
UNET_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESIDUAL = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
_VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_ATTENTION_OLD = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # before diffusers 0.14


HYBRID_VAE: tuple[Rule, ...] = tuple(
    (AsConv if leaf == "weight" else Rename)(f"{side}.mid.attn_1.{layer}.{leaf}", f"{side}.mid.attn_1.{target}.{leaf}")
    for side in ("encoder", "decoder")
    for leaf in ("weight", "bias")
    for layer, target in {
        **{f"{start}{each}": each for start in ("", "to_", "to_to_") for each in "qkv"},
        "query": "q",
        "key": "k",
        "value": "v",
        "to_out.0": "proj_out",
        "to_out": "proj_out",
        "proj_attn": "proj_out",
        "proj_out": "proj_out",
    }.items()
) + tuple(
    Rename(f"{side}.mid.attn_1.group_norm.{leaf}", f"{side}.mid.attn_1.norm.{leaf}")
    for side in ("encoder", "decoder")
    for leaf in ("weight", "bias")
)
"""Attention of an autoencoder with the original's names, but its layers as some of diffusers' converters left them:
with diffusers' names, or as linear layers."""


def residual_rules(old: str, new: str, layers: Mapping[str, str] = UNET_RESIDUAL) -> list[Rule]:
    """The rules of one residual block, named `old` in diffusers and `new` in the original; `layers` maps its layers."""
    return [Rename(f"{old}.{layer}.{{leaf}}", f"{new}.{target}.{{leaf}}") for layer, target in layers.items()]


def unet_rules(attends: Sequence[bool], res_blocks: int) -> tuple[Rule, ...]:
    """diffusers' U-Net -> `UNet`. `attends[i]`: whether level i, counted from the finest, has transformers."""
    rules = list(UNET_STEM)
    for kind, old, new in unet_blocks(attends, res_blocks):
        if kind == "residual":
            rules += residual_rules(old, new)
        else:
            rules.append(Rename(f"{old}.{{rest*}}", f"{new}.{{rest*}}"))
    return tuple(rules)


def unet_blocks(attends: Sequence[bool], res_blocks: int) -> Iterator[tuple[Block, str, str]]:
    """Every block of a U-Net as (kind, name in diffusers, name in the original)."""
    number = 1
    for level, attention in enumerate(attends):
        down = f"down_blocks.{level}"
        for index in range(res_blocks):
            yield "residual", f"{down}.resnets.{index}", f"input_blocks.{number}.0"
            if attention:
                yield "transformer", f"{down}.attentions.{index}", f"input_blocks.{number}.1"
            number += 1
        if level < len(attends) - 1:
            yield "resample", f"{down}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1

    yield "residual", "mid_block.resnets.0", "middle_block.0"
    yield "transformer", "mid_block.attentions.0", "middle_block.1"
    yield "residual", "mid_block.resnets.1", "middle_block.2"

    number = 0
    for level, attention in enumerate(reversed(attends)):
        up = f"up_blocks.{level}"
        for index in range(res_blocks + 1):
            yield "residual", f"{up}.resnets.{index}", f"output_blocks.{number}.0"
            if attention:
                yield "transformer", f"{up}.attentions.{index}", f"output_blocks.{number}.1"
            number += 1
        if level < len(attends) - 1:
            yield "resample", f"{up}.upsamplers.0.conv", f"output_blocks.{number - 1}.{2 if attention else 1}.conv"


def unet_topology(names: Iterable[str]) -> tuple[tuple[bool, ...], int]:
    """(attends, res_blocks) of a U-Net under diffusers' names, for `unet_rules`.

    Distinct numbers are counted and their values ignored: a file that names only level 10**12 has one level. Raises
    ModelError for more than `_MAX_BLOCKS`.
    """
    levels, blocks, attending = set[str](), set[str](), set[str]()
    for name in names:
        match name.split(".")[:4]:
            case ["down_blocks", level, "resnets", index]:
                levels.add(level)
                blocks.add(index)
            case ["down_blocks", level, "attentions", _]:
                attending.add(level)
    if len(levels) > _MAX_BLOCKS or len(blocks) > _MAX_BLOCKS:
        raise ModelError(f"its U-Net has {len(levels)} levels of {len(blocks)} blocks: expected at most {_MAX_BLOCKS}")
    return tuple(str(level) in attending for level in range(len(levels))), len(blocks)


def vae_rules(levels: int, old_attention: bool = False) -> tuple[Rule, ...]:
    """diffusers' autoencoder -> `Autoencoder`. `old_attention`: names query, key, value, proj_attn instead of to_q ...

    Both store the attention's matrices as linear layers; the original has 1x1 convolutions.
    """
    rules = vae_frame(levels, old_attention)
    for old, new in vae_blocks(levels):
        rules += residual_rules(old, new, VAE_RESIDUAL)
    return tuple(rules)


def vae_frame(levels: int, old_attention: bool = False) -> list[Rule]:
    """The rules of an autoencoder except its residual blocks."""
    rules: list[Rule] = [Rename(f"{name}.{{leaf}}", f"{name}.{{leaf}}") for name in ("quant_conv", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        for old, new in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            rules.append(Rename(f"{side}.{old}.{{leaf}}", f"{side}.{new}.{{leaf}}"))
        old, new = f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1"
        rules.append(Rename(f"{old}.group_norm.{{leaf}}", f"{new}.norm.{{leaf}}"))
        for layer, target in (_VAE_ATTENTION_OLD if old_attention else _VAE_ATTENTION).items():
            rules.append(AsConv(f"{old}.{layer}.weight", f"{new}.{target}.weight"))
            rules.append(Rename(f"{old}.{layer}.bias", f"{new}.{target}.bias"))

    rules.append(Rename("encoder.down_blocks.{i}.downsamplers.0.{rest*}", "encoder.down.{i}.downsample.{rest*}"))
    for level in range(levels):
        old, new = f"decoder.up_blocks.{levels - 1 - level}", f"decoder.up.{level}"
        rules.append(Rename(f"{old}.upsamplers.0.{{rest*}}", f"{new}.upsample.{{rest*}}"))
    return rules


def vae_blocks(levels: int) -> Iterator[tuple[str, str]]:
    """Every residual block of an autoencoder as (name in diffusers, name in the original)."""
    for side in ("encoder", "decoder"):
        yield f"{side}.mid_block.resnets.0", f"{side}.mid.block_1"
        yield f"{side}.mid_block.resnets.1", f"{side}.mid.block_2"
    yield "encoder.down_blocks.{i}.resnets.{j}", "encoder.down.{i}.block.{j}"
    for level in range(levels):  # the original numbers the decoder's levels by resolution, diffusers by order
        yield f"decoder.up_blocks.{levels - 1 - level}.resnets.{{j}}", f"decoder.up.{level}.block.{{j}}"


def vae_topology(names: Iterable[str]) -> tuple[int, bool]:
    """(levels, old_attention) of an autoencoder under diffusers' names, for `vae_rules`; counts distinct levels."""
    down, up, old = set[str](), set[str](), False
    for name in names:
        match name.split(".", 6):
            case ["encoder", "down_blocks", level, *_]:
                down.add(level)
            case ["decoder", "up_blocks", level, *_]:
                up.add(level)
            case [_, "mid_block", "attentions", "0", "query" | "key" | "value" | "proj_attn", _]:
                old = True
    return max(len(down), len(up)), old

"""U-Net and autoencoder as a diffusers folder names them, to the names of the original single files.

diffusers numbers blocks within levels, the original straight through, so the tables are written out for a number
of levels, of residual blocks a level, and for which levels attend. Whether `proj_in` is a convolution or a linear
layer is a matter of shape alone: both layouts have the one the network was made with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

from gouache.errors import ModelError
from gouache.layouts.rules import AsConv, Rename, Rule

_MOST = 16  # levels, and residual blocks a level, that a table is written out for; released U-Nets have 4 and 2

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


def residual_rules(old: str, new: str, layers: Mapping[str, str] = UNET_RESIDUAL) -> list[Rule]:
    """One residual block: `old` and `new` are what it is called, `layers` what its layers are."""
    return [Rename(f"{old}.{layer}.{{leaf}}", f"{new}.{place}.{{leaf}}") for layer, place in layers.items()]


def unet_rules(attends: Sequence[bool], res_blocks: int) -> tuple[Rule, ...]:
    """diffusers' U-Net -> `UNet`. `attends[i]`: does level i, counted from the finest, hold transformers."""
    rules = list(UNET_STEM)
    for kind, old, new in unet_blocks(attends, res_blocks):
        if kind == "residual":
            rules += residual_rules(old, new)
        else:
            rules.append(Rename(f"{old}.{{rest*}}", f"{new}.{{rest*}}"))
    return tuple(rules)


def unet_blocks(attends: Sequence[bool], res_blocks: int) -> Iterator[tuple[Block, str, str]]:
    """Every block of a U-Net and what it is called: (kind, by diffusers, in the original)."""
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

    Numbers are counted, not believed: a file that names level 1e12 has one level. ModelError for more than are sane.
    """
    levels, blocks, attending = set[str](), set[str](), set[str]()
    for name in names:
        match name.split(".")[:4]:
            case ["down_blocks", level, "resnets", index]:
                levels.add(level)
                blocks.add(index)
            case ["down_blocks", level, "attentions", _]:
                attending.add(level)
    if len(levels) > _MOST or len(blocks) > _MOST:
        raise ModelError(f"its U-Net has {len(levels)} levels of {len(blocks)} blocks: expected at most {_MOST}")
    return tuple(str(level) in attending for level in range(len(levels))), len(blocks)


def vae_rules(levels: int, old_attention: bool = False) -> tuple[Rule, ...]:
    """diffusers' autoencoder -> `Autoencoder`. `old_attention`: query, key, value, proj_attn instead of to_q ...

    Both generations keep the attention's matrices as linear layers where the original has 1x1 convolutions.
    """
    rules = vae_frame(levels, old_attention)
    for old, new in vae_blocks(levels):
        rules += residual_rules(old, new, VAE_RESIDUAL)
    return tuple(rules)


def vae_frame(levels: int, old_attention: bool = False) -> list[Rule]:
    """All of an autoencoder but its residual blocks."""
    rules: list[Rule] = [Rename(f"{name}.{{leaf}}", f"{name}.{{leaf}}") for name in ("quant_conv", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        for old, new in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            rules.append(Rename(f"{side}.{old}.{{leaf}}", f"{side}.{new}.{{leaf}}"))
        attention, ours = f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1"
        rules.append(Rename(f"{attention}.group_norm.{{leaf}}", f"{ours}.norm.{{leaf}}"))
        for layer, place in (_VAE_ATTENTION_OLD if old_attention else _VAE_ATTENTION).items():
            rules.append(AsConv(f"{attention}.{layer}.weight", f"{ours}.{place}.weight"))
            rules.append(Rename(f"{attention}.{layer}.bias", f"{ours}.{place}.bias"))

    rules.append(Rename("encoder.down_blocks.{i}.downsamplers.0.{rest*}", "encoder.down.{i}.downsample.{rest*}"))
    for level in range(levels):
        up, ours = f"decoder.up_blocks.{levels - 1 - level}", f"decoder.up.{level}"
        rules.append(Rename(f"{up}.upsamplers.0.{{rest*}}", f"{ours}.upsample.{{rest*}}"))
    return rules


def vae_blocks(levels: int) -> Iterator[tuple[str, str]]:
    """Every residual block of an autoencoder and what it is called: (by diffusers, in the original)."""
    for side in ("encoder", "decoder"):
        yield f"{side}.mid_block.resnets.0", f"{side}.mid.block_1"
        yield f"{side}.mid_block.resnets.1", f"{side}.mid.block_2"
    yield "encoder.down_blocks.{i}.resnets.{j}", "encoder.down.{i}.block.{j}"
    for level in range(levels):  # the original numbers the decoder's levels by resolution, diffusers by order
        yield f"decoder.up_blocks.{levels - 1 - level}.resnets.{{j}}", f"decoder.up.{level}.block.{{j}}"


def vae_topology(names: Iterable[str]) -> tuple[int, bool]:
    """(levels, old_attention) of an autoencoder under diffusers' names, for `vae_rules`. Levels are counted."""
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

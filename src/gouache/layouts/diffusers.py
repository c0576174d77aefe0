"""U-Net and autoencoder as a diffusers folder names them, to the names of the original single files.

diffusers numbers blocks within levels, the original straight through, so the tables are written out for a number
of levels, of residual blocks a level, and for which levels attend. Whether `proj_in` is a convolution or a linear
layer is a matter of shape alone: both layouts have the one the network was made with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gouache.errors import ModelError
from gouache.layouts.rules import AsConv, Rename, Rule

_MOST = 16  # levels, and residual blocks a level, that a table is written out for; released U-Nets have 4 and 2

_STEM = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESIDUAL = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
_VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_ATTENTION_OLD = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # before diffusers 0.14


def unet_rules(attends: Sequence[bool], res_blocks: int) -> tuple[Rule, ...]:
    """diffusers' U-Net -> `UNet`. `attends[i]`: does level i, counted from the finest, hold transformers."""
    rules = [Rename(f"{old}.{{leaf}}", f"{new}.{{leaf}}") for old, new in _STEM.items()]

    def residual(old: str, new: str) -> None:
        for layer, place in _RESIDUAL.items():
            rules.append(Rename(f"{old}.{layer}.{{leaf}}", f"{new}.{place}.{{leaf}}"))

    def same(old: str, new: str) -> None:
        rules.append(Rename(f"{old}.{{rest*}}", f"{new}.{{rest*}}"))

    number = 1
    for level, attention in enumerate(attends):
        down = f"down_blocks.{level}"
        for index in range(res_blocks):
            residual(f"{down}.resnets.{index}", f"input_blocks.{number}.0")
            if attention:
                same(f"{down}.attentions.{index}", f"input_blocks.{number}.1")
            number += 1
        if level < len(attends) - 1:
            same(f"{down}.downsamplers.0.conv", f"input_blocks.{number}.0.op")
            number += 1

    residual("mid_block.resnets.0", "middle_block.0")
    same("mid_block.attentions.0", "middle_block.1")
    residual("mid_block.resnets.1", "middle_block.2")

    number = 0
    for level, attention in enumerate(reversed(attends)):
        up = f"up_blocks.{level}"
        for index in range(res_blocks + 1):
            residual(f"{up}.resnets.{index}", f"output_blocks.{number}.0")
            if attention:
                same(f"{up}.attentions.{index}", f"output_blocks.{number}.1")
            number += 1
        if level < len(attends) - 1:
            same(f"{up}.upsamplers.0.conv", f"output_blocks.{number - 1}.{2 if attention else 1}.conv")
    return tuple(rules)


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
    rules: list[Rule] = [Rename(f"{name}.{{leaf}}", f"{name}.{{leaf}}") for name in ("quant_conv", "post_quant_conv")]

    def residual(old: str, new: str) -> None:
        for layer, place in _VAE_RESIDUAL.items():
            rules.append(Rename(f"{old}.{layer}.{{leaf}}", f"{new}.{place}.{{leaf}}"))

    for side in ("encoder", "decoder"):
        for old, new in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            rules.append(Rename(f"{side}.{old}.{{leaf}}", f"{side}.{new}.{{leaf}}"))
        residual(f"{side}.mid_block.resnets.0", f"{side}.mid.block_1")
        residual(f"{side}.mid_block.resnets.1", f"{side}.mid.block_2")
        attention, ours = f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1"
        rules.append(Rename(f"{attention}.group_norm.{{leaf}}", f"{ours}.norm.{{leaf}}"))
        for layer, place in (_VAE_ATTENTION_OLD if old_attention else _VAE_ATTENTION).items():
            rules.append(AsConv(f"{attention}.{layer}.weight", f"{ours}.{place}.weight"))
            rules.append(Rename(f"{attention}.{layer}.bias", f"{ours}.{place}.bias"))

    residual("encoder.down_blocks.{i}.resnets.{j}", "encoder.down.{i}.block.{j}")
    rules.append(Rename("encoder.down_blocks.{i}.downsamplers.0.{rest*}", "encoder.down.{i}.downsample.{rest*}"))
    for level in range(levels):  # the original numbers the decoder's levels by resolution, diffusers by order
        up, ours = f"decoder.up_blocks.{levels - 1 - level}", f"decoder.up.{level}"
        residual(f"{up}.resnets.{{j}}", f"{ours}.block.{{j}}")
        rules.append(Rename(f"{up}.upsamplers.0.{{rest*}}", f"{ours}.upsample.{{rest*}}"))
    return tuple(rules)


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

"""Stable Video Diffusion as a diffusers folder names it, to the names of the original single file.

Wherever Stable Diffusion has a residual block or a transformer, this line has one for each picture and one across
time, and a factor that mixes what the two say. diffusers puts both halves of a residual block into folders of their
own; the original leaves the first where it always was and calls the other `time_stack`.
"""

from __future__ import annotations

from collections.abc import Sequence

from gouache.layouts.diffusers import UNET_STEM, VAE_RESIDUAL, residual_rules, unet_blocks, vae_blocks, vae_frame
from gouache.layouts.rules import Rename, Rule

# The half of a residual block that looks across time. It never changes the width, so that it needs no shortcut.
_ACROSS_TIME = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
_ACROSS_TIME_TIMED = _ACROSS_TIME | {"time_emb_proj": "emb_layers.1"}  # in the U-Net, which is told the noise level


def video_unet_rules(attends: Sequence[bool], res_blocks: int) -> tuple[Rule, ...]:
    """diffusers' `UNetSpatioTemporalConditionModel` -> the U-Net below `model.diffusion_model.`.

    `attends` and `res_blocks` as in `unet_rules`; `unet_topology` reads them from these names too.
    """
    rules = list(UNET_STEM)
    for kind, old, new in unet_blocks(attends, res_blocks):
        if kind == "residual":
            rules += residual_rules(f"{old}.spatial_res_block", new)
            rules += residual_rules(f"{old}.temporal_res_block", f"{new}.time_stack", _ACROSS_TIME_TIMED)
            rules.append(Rename(f"{old}.time_mixer.mix_factor", f"{new}.time_mixer.mix_factor"))
            continue
        if kind == "transformer":
            rules.append(Rename(f"{old}.temporal_transformer_blocks.{{rest*}}", f"{new}.time_stack.{{rest*}}"))
            rules.append(Rename(f"{old}.time_pos_embed.linear_1.{{leaf}}", f"{new}.time_pos_embed.0.{{leaf}}"))
            rules.append(Rename(f"{old}.time_pos_embed.linear_2.{{leaf}}", f"{new}.time_pos_embed.2.{{leaf}}"))
        rules.append(Rename(f"{old}.{{rest*}}", f"{new}.{{rest*}}"))
    return tuple(rules)


def video_vae_rules(levels: int) -> tuple[Rule, ...]:
    """diffusers' `AutoencoderKLTemporalDecoder` -> two networks of the original, whose names do not meet.

    `decoder.` is that of `first_stage_model.`, which mixes frames. `encoder.` and `quant_conv.` are those of the
    autoencoder that the original encodes the first frame with (`conditioner.embedders.3.encoder.`); the encoder of
    `first_stage_model.`, which has no `quant_conv`, served to train and has no place in a folder.
    """
    rules = vae_frame(levels)
    for old, new in vae_blocks(levels):
        if old.startswith("encoder."):
            rules += residual_rules(old, new, VAE_RESIDUAL)
        else:
            rules += residual_rules(f"{old}.spatial_res_block", new, VAE_RESIDUAL)
            rules += residual_rules(f"{old}.temporal_res_block", f"{new}.time_stack", _ACROSS_TIME)
            rules.append(Rename(f"{old}.time_mixer.mix_factor", f"{new}.mix_factor"))
    rules.append(Rename("decoder.time_conv_out.{leaf}", "decoder.conv_out.time_mix_conv.{leaf}"))
    return tuple(rules)

"""Maps tensor names of Stable Video Diffusion in a diffusers folder to those of the original single file.

For each residual block or transformer of Stable Diffusion, this line has a spatial and a temporal one, and a factor
that mixes their outputs. diffusers gives both halves of a residual block a prefix (`spatial_res_block`,
`temporal_res_block`); the original keeps the names of the spatial half and calls the temporal one `time_stack`.
"""

from __future__ import annotations

from collections.abc import Sequence

from gouache.layouts.diffusers import UNET_STEM, VAE_RESIDUAL, residual_rules, unet_blocks, vae_blocks, vae_frame
from gouache.layouts.rules import Rename, Rule

# The temporal half of a residual block. It never changes the width, so it has no shortcut.
_TEMPORAL = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
_TEMPORAL_UNET = _TEMPORAL | {"time_emb_proj": "emb_layers.1"}  # in the U-Net, which has a timestep embedding


def video_unet_rules(attends: Sequence[bool], res_blocks: int) -> tuple[Rule, ...]:
    """diffusers' `UNetSpatioTemporalConditionModel` -> the U-Net under `model.diffusion_model.`.

    `attends` and `res_blocks` are as in `unet_rules`; `unet_topology` reads them from these names too.
    """
    rules = list(UNET_STEM)
    for kind, old, new in unet_blocks(attends, res_blocks):
        if kind == "residual":
            rules += residual_rules(f"{old}.spatial_res_block", new)
            rules += residual_rules(f"{old}.temporal_res_block", f"{new}.time_stack", _TEMPORAL_UNET)
            rules.append(Rename(f"{old}.time_mixer.mix_factor", f"{new}.time_mixer.mix_factor"))
            continue
        if kind == "transformer":
            rules.append(Rename(f"{old}.temporal_transformer_blocks.{{rest*}}", f"{new}.time_stack.{{rest*}}"))
            rules.append(Rename(f"{old}.time_pos_embed.linear_1.{{leaf}}", f"{new}.time_pos_embed.0.{{leaf}}"))
            rules.append(Rename(f"{old}.time_pos_embed.linear_2.{{leaf}}", f"{new}.time_pos_embed.2.{{leaf}}"))
        rules.append(Rename(f"{old}.{{rest*}}", f"{new}.{{rest*}}"))
    return tuple(rules)


def video_vae_rules(levels: int) -> tuple[Rule, ...]:
    """diffusers' `AutoencoderKLTemporalDecoder` -> parts of two networks of the original, without common names.

    `decoder.` is that of `first_stage_model.`, which mixes frames. `encoder.` and `quant_conv.` are those of the
    autoencoder with which the original encodes the first frame (`conditioner.embedders.3.encoder.`). The encoder of
    `first_stage_model.`, which has no `quant_conv`, was used for training only and is not in a diffusers folder.
    """
    rules = vae_frame(levels)
    for old, new in vae_blocks(levels):
        if old.startswith("encoder."):
            rules += residual_rules(old, new, VAE_RESIDUAL)
        else:
            rules += residual_rules(f"{old}.spatial_res_block", new, VAE_RESIDUAL)
            rules += residual_rules(f"{old}.temporal_res_block", f"{new}.time_stack", _TEMPORAL)
            rules.append(Rename(f"{old}.time_mixer.mix_factor", f"{new}.mix_factor"))
    rules.append(Rename("decoder.time_conv_out.{leaf}", "decoder.conv_out.time_mix_conv.{leaf}"))
    return tuple(rules)

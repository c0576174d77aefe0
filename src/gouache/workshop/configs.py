"""The JSON files of a diffusers folder, generated from the specs of the networks, for models converted to that layout.

Keys and values are those of diffusers and Transformers. A value that equals their default is left out unless the
released folders contain it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gouache.families.family import NoiseLevels
from gouache.families.found import Component, Found
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec
from gouache.prompts.recipe import EncoderRecipe

_VERSION = "0.32.0"  # the diffusers release whose config format this is

_PIPELINES = {
    ("sd1", "base"): "StableDiffusionPipeline",
    ("sd1", "inpainting"): "StableDiffusionInpaintPipeline",
    ("sd1", "instruct-pix2pix"): "StableDiffusionInstructPix2PixPipeline",
    ("sd2", "base"): "StableDiffusionPipeline",
    ("sd2", "inpainting"): "StableDiffusionInpaintPipeline",
    ("sd2", "depth"): "StableDiffusionDepth2ImgPipeline",
    ("sdxl", "base"): "StableDiffusionXLPipeline",
    ("sdxl", "inpainting"): "StableDiffusionXLInpaintPipeline",
    ("sdxl", "instruct-pix2pix"): "StableDiffusionXLInstructPix2PixPipeline",
    ("sdxl-refiner", "base"): "StableDiffusionXLImg2ImgPipeline",
}


def pipeline(found: Found) -> dict[str, Any]:
    """The files that do not belong to one network: {path in the folder: content}."""
    return {"model_index.json": index(found), "scheduler/scheduler_config.json": scheduler(found)}


def index(found: Found) -> dict[str, Any]:
    """`model_index.json`: which class loads each subfolder. Absent components are [null, null]."""
    family = found.family.value
    name = family.name if family is not None else "sd1"
    large = name.startswith("sdxl")
    entries: dict[str, Any] = {
        "_class_name": _PIPELINES.get((name, str(found.variant.value)), _PIPELINES[name, "base"]),
        "_diffusers_version": _VERSION,
    }
    if large:
        entries["force_zeros_for_empty_prompt"] = name == "sdxl"
        if name == "sdxl-refiner":
            entries["requires_aesthetics_score"] = True
        for encoder in ("text_encoder", "text_encoder_2"):
            present = encoder in found.components
            class_name = "CLIPTextModelWithProjection" if encoder == "text_encoder_2" else "CLIPTextModel"
            entries[encoder] = ["transformers", class_name] if present else [None, None]
            entries[encoder.replace("text_encoder", "tokenizer")] = (
                ["transformers", "CLIPTokenizer"] if present else [None, None]
            )
    else:
        entries["text_encoder"] = ["transformers", "CLIPTextModel"]
        entries["tokenizer"] = ["transformers", "CLIPTokenizer"]
        entries["safety_checker"] = entries["feature_extractor"] = [None, None]
        entries["requires_safety_checker"] = False
    if found.variant.value == "depth":
        entries["depth_estimator"] = [None, None]
    entries["unet"] = ["diffusers", "UNet2DConditionModel"]
    entries["vae"] = ["diffusers", "AutoencoderKL"]
    entries["scheduler"] = ["diffusers", "EulerDiscreteScheduler" if large else "DDIMScheduler"]
    return entries


def scheduler(found: Found) -> dict[str, Any]:
    """`scheduler/scheduler_config.json`: the noise schedule and the prediction type."""
    family = found.family.value
    levels = family.levels if family is not None else NoiseLevels()
    zero_snr = found.zero_snr is not None and found.zero_snr.value
    config: dict[str, Any] = {
        "_class_name": index(found)["scheduler"][1],
        "_diffusers_version": _VERSION,
        "beta_start": levels.low,
        "beta_end": levels.high,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": levels.steps,
        "prediction_type": "v_prediction" if found.prediction and found.prediction.value == "v" else "epsilon",
        "steps_offset": 1,
        "trained_betas": None,
        # Sampling with zero terminal SNR must start exactly at the last timestep, which is pure noise.
        "timestep_spacing": "trailing" if zero_snr else "leading",
        "rescale_betas_zero_snr": bool(zero_snr),
    }
    if config["_class_name"] == "DDIMScheduler":
        config |= {"clip_sample": False, "set_alpha_to_one": False}
    return config


def unet(spec: UNetSpec, found: Found) -> dict[str, Any]:
    widths = [spec.channels * mult for mult in spec.channel_mult]
    heads = [spec.heads or max(1, width // (spec.head_channels or 64)) for width in widths]
    has_attention = [bool(depth) for depth in spec.attention_depth]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": _VERSION,
        "act_fn": "silu",
        # diffusers keeps this misleading name for the number of heads, for compatibility with its first files.
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": spec.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in has_attention],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": spec.in_channels,
        "layers_per_block": spec.res_blocks,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": spec.out_channels,
        "sample_size": (found.size.value[0] if found.size else 512) // 8,
        "up_block_types": ["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(has_attention)],
        "use_linear_projection": spec.linear_projection,
    }
    depths = [depth or spec.middle_depth if level == len(widths) - 1 else depth or 1
              for level, depth in enumerate(spec.attention_depth)]  # fmt: skip
    if set(depths) != {1}:
        config["transformer_layers_per_block"] = depths
    if spec.vector_channels:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": spec.vector_channels,
        }
    return config


def vae(spec: VaeSpec, found: Found) -> dict[str, Any]:
    family = found.family.value
    levels = len(spec.channel_mult)
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": _VERSION,
        "act_fn": "silu",
        "block_out_channels": [spec.channels * mult for mult in spec.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": spec.image_channels,
        "latent_channels": spec.latent_channels,
        "layers_per_block": spec.res_blocks,
        "norm_num_groups": 32,
        "out_channels": spec.image_channels,
        "sample_size": found.size.value[0] if found.size else 512,
        "scaling_factor": found.latent_scale.value if found.latent_scale else 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    if family is not None and family.name.startswith("sdxl"):
        config["force_upcast"] = True  # its released weights overflow in float16
    return config


def text_encoder(spec: TextSpec) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModelWithProjection" if spec.projection else "CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 49406,
        "dropout": 0.0,
        "eos_token_id": 49407,
        "hidden_act": spec.activation,
        "hidden_size": spec.width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": spec.mlp_width,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": spec.positions,
        "model_type": "clip_text_model",
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "pad_token_id": 49407,
        "projection_dim": spec.projection or spec.width,
        "vocab_size": spec.vocabulary,
    }


def tokenizer(encoder: EncoderRecipe) -> dict[str, Any]:
    """`tokenizer_config.json`. `encoder` specifies the padding token."""
    pad = "!" if encoder.pad_token == 0 else "<|endoftext|>"
    return {
        "add_prefix_space": False,
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    }


def special_tokens(encoder: EncoderRecipe) -> dict[str, Any]:
    config = tokenizer(encoder)
    return {key: config[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token")}


def component(part: Component, found: Found) -> dict[str, Any]:
    """The `config.json` of one component."""
    if isinstance(part.spec, UNetSpec):
        return unet(part.spec, found)
    if isinstance(part.spec, VaeSpec):
        return vae(part.spec, found)
    assert isinstance(part.spec, TextSpec)
    return text_encoder(part.spec)


def text_of(value: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file, formatted as diffusers and Transformers write it."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()

"""The JSON files of a Stable Video Diffusion folder in diffusers' layout, generated from the specs of its networks.

As in `configs`, keys are those of diffusers and Transformers, and values those of the released folders.
"""

from __future__ import annotations

import re
from typing import Any

from gouache.families.family import NoiseLevels
from gouache.families.found import Found
from gouache.nn.spec import UNetSpec, VaeSpec, VisionSpec

_VERSION = "0.32.0"  # the diffusers release whose config format this is


def pipeline(found: Found) -> dict[str, Any]:
    """The files that do not belong to one network: {path in the folder: content}."""
    return {
        "model_index.json": {
            "_class_name": "StableVideoDiffusionPipeline",
            "_diffusers_version": _VERSION,
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
            "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
        },
        "scheduler/scheduler_config.json": scheduler(found),
        "feature_extractor/preprocessor_config.json": feature_extractor(),
    }


def scheduler(found: Found) -> dict[str, Any]:
    """`scheduler/scheduler_config.json`: continuous sigmas between two limits, spaced as in Karras et al. 2022. The
    betas have no effect in that case."""
    levels = found.levels.value if found.levels is not None else NoiseLevels("edm", 0.002, 700.0)
    return {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": _VERSION,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "interpolation_type": "linear",
        "num_train_timesteps": levels.steps,
        "prediction_type": "v_prediction",
        "sigma_max": levels.high,
        "sigma_min": levels.low,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "timestep_type": "continuous",
        "trained_betas": None,
        "use_karras_sigmas": True,
    }


def feature_extractor() -> dict[str, Any]:
    """CLIP's image preprocessing, with the mean and standard deviation of OpenAI's training pictures."""
    return {
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 224},
    }


def unet(spec: UNetSpec, found: Found) -> dict[str, Any]:
    widths = [spec.channels * mult for mult in spec.channel_mult]
    has_attention = [bool(depth) for depth in spec.attention_depth]
    depths = [depth or 1 for depth in spec.attention_depth]
    return {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "_diffusers_version": _VERSION,
        "addition_time_embed_dim": spec.vector_channels // 3,  # frames per second, motion, noise on the first frame
        "block_out_channels": widths,
        "cross_attention_dim": spec.context_dim,
        "down_block_types": [f"{'CrossAttn' * cross}DownBlockSpatioTemporal" for cross in has_attention],
        "in_channels": spec.in_channels,
        "layers_per_block": spec.res_blocks,
        "num_attention_heads": [max(1, width // 64) for width in widths],
        "num_frames": _frames(found.path.name),
        "out_channels": spec.out_channels,
        "projection_class_embeddings_input_dim": spec.vector_channels,
        "sample_size": 96,
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "up_block_types": [f"{'CrossAttn' * cross}UpBlockSpatioTemporal" for cross in reversed(has_attention)],
    }


def _frames(name: str) -> int:
    """The number of frames it was trained on, which only the file name shows: 14, or 25 for XT and unclear names."""
    return 14 if re.search(r"svd|img2vid", name, re.IGNORECASE) and "xt" not in name.lower() else 25


def vae(spec: VaeSpec, found: Found) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKLTemporalDecoder",
        "_diffusers_version": _VERSION,
        "block_out_channels": [spec.channels * mult for mult in spec.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * len(spec.channel_mult),
        "force_upcast": True,
        "in_channels": spec.image_channels,
        "latent_channels": spec.latent_channels,
        "layers_per_block": spec.res_blocks,
        "out_channels": spec.image_channels,
        "sample_size": 768,
        "scaling_factor": found.latent_scale.value if found.latent_scale else 0.18215,
    }


def image_encoder(spec: VisionSpec) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": spec.activation,
        "hidden_size": spec.width,
        "image_size": spec.image_size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": spec.mlp_width,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": spec.heads,
        "num_channels": 3,
        "num_hidden_layers": spec.layers,
        "patch_size": spec.patch_size,
        "projection_dim": spec.projection,
    }

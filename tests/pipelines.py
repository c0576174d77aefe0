"""Narrow pipelines of diffusers with seeded weights: an independent Stable Diffusion to compare Gouache with.

They have the topologies of the released models (levels, transformers, encoders, the 23 blocks of SD2's text encoder) at
widths that run in milliseconds. Heads are those of the families, since single files do not state them: 8 in SD1's
U-Net, 64 channels per head everywhere else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.nn.narrow import scramble

LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@dataclass(frozen=True)
class Narrow:
    """A pipeline in memory, the folder it was saved in, and the single file that `gouache convert` made from it."""

    pipeline: Any
    folder: Path
    file: Path


def build(family: str, clip_folder: Path) -> Any:
    """The pipeline of `family`: "sd1", "sd1-inpainting", "sd1-edit", "sd2" (velocity), "sd2-depth", "sdxl"."""
    import diffusers
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(clip_folder))
    parts: dict[str, Any] = {"tokenizer": tokenizer, "scheduler": scheduler("Euler", family)}
    if family == "sdxl":
        # SDXL's second tokenizer pads with "!", the token 0.
        parts["tokenizer_2"] = CLIPTokenizer.from_pretrained(str(clip_folder), pad_token="!")
        parts["text_encoder"] = text_encoder(64, 4, "quick_gelu", seed=1)
        parts["text_encoder_2"] = text_encoder(128, 5, "gelu", seed=2, projection=96)
        parts["unet"] = _unet(sdxl=True, cross_attention_dim=64 + 128)
        parts["vae"] = _vae(scaling_factor=0.13025)
        parts["force_zeros_for_empty_prompt"], parts["add_watermarker"] = True, False
        return _quiet(diffusers.StableDiffusionXLPipeline(**parts))
    if family.startswith("sd2"):
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(str(clip_folder), pad_token="!")
        parts["text_encoder"] = text_encoder(64, 23, "gelu", seed=1)
        parts["unet"] = _unet(linear=True, in_channels=5 if family == "sd2-depth" else 4)
    else:
        parts["text_encoder"] = text_encoder(64, 4, "quick_gelu", seed=1)
        parts["unet"] = _unet(in_channels={"sd1-inpainting": 9, "sd1-edit": 8}.get(family, 4))
    parts |= {"vae": _vae(), "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if family == "sd1-inpainting":
        return _quiet(diffusers.StableDiffusionInpaintPipeline(**parts))
    if family == "sd1-edit":
        return _quiet(diffusers.StableDiffusionInstructPix2PixPipeline(**parts))
    return _quiet(diffusers.StableDiffusionPipeline(**parts))


def scheduler(sampler: str, family: str) -> Any:
    """diffusers' scheduler of the method `sampler`, with the spacing of `SPACINGS`."""
    import diffusers

    levels = LEVELS | {"prediction_type": "v_prediction" if family == "sd2" else "epsilon"}
    match sampler:
        case "Euler":
            # linspace(0, 999, steps), not rounded: Uniform. (diffusers interpolates sigma, we ln sigma: some 1e-5.)
            return diffusers.EulerDiscreteScheduler(**levels, timestep_spacing="linspace")
        case "DDIM":
            # Strides of T // steps and an offset of 1, as its authors have it. It ends on the first level, not on 0.
            return diffusers.DDIMScheduler(**levels, clip_sample=False, set_alpha_to_one=False)
        case "DPM++ 2M":
            # Rounded strides of T / steps down from the last level: Simple, as long as the strides are whole.
            return diffusers.DPMSolverMultistepScheduler(**levels, timestep_spacing="trailing")
    raise KeyError(sampler)


SPACINGS = {"Euler": "Uniform", "DDIM": "DDIM", "DPM++ 2M": "Simple"}


def _unet(*, in_channels: int = 4, linear: bool = False, sdxl: bool = False, cross_attention_dim: int = 64) -> Any:
    from diffusers import UNet2DConditionModel

    if sdxl:
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(64, 64, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(1, 1, 2),  # heads, in spite of the name
            use_linear_projection=True,
            cross_attention_dim=cross_attention_dim,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=96 + 6 * 256,
        )
    else:
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=in_channels,
            block_out_channels=(64, 64, 128, 128) if linear else (32, 32, 64, 64),
            attention_head_dim=(1, 1, 2, 2) if linear else 8,  # heads, in spite of the name
            use_linear_projection=linear,
            cross_attention_dim=cross_attention_dim,
        )
    return scramble(unet, seed=3)


def _vae(scaling_factor: float = 0.18215) -> Any:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=64,
        scaling_factor=scaling_factor,
    )
    return scramble(vae, seed=4)


def text_encoder(width: int, layers: int, activation: str, *, seed: int, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=96,
        hidden_act=activation,
        projection_dim=projection or width,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return scramble((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed)


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(pipeline: Any, folder: Path, **options: Any) -> Path:
    """Save the pipeline in `folder`, as diffusers does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.save_pretrained(folder, **options)
    return folder


def altered(file: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Write the tensors of the safetensors file `file`, changed in place by `change`, and its metadata to `target`."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    change(tensors)
    with safe_open(file, "pt") as opened:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target, opened.metadata())
    return target

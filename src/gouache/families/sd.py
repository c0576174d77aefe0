"""Stable Diffusion 1 and 2 (Rombach et al. 2022), with their inpainting, edit and depth variants."""

from __future__ import annotations

from gouache.families.family import ComponentLocation, Family
from gouache.layouts.rules import Drop
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec
from gouache.prompts.recipe import EncoderRecipe, TextRecipe

CLIP_L = TextSpec()
OPENCLIP_H = TextSpec(width=1024, layers=24, heads=16, mlp_width=4096, activation="gelu", projection=1024)

SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1",
    locations=(
        ComponentLocation("unet", "model.diffusion_model.", "original", UNetSpec()),
        ComponentLocation("vae", "first_stage_model.", "original", VaeSpec()),
        ComponentLocation("text_encoder", "cond_stage_model.transformer.", "transformers", CLIP_L),
    ),
    text=TextRecipe(encoders=(EncoderRecipe("text_encoder"),)),
    latent_scale=0.18215,
    size=(512, 512),
    variants={4: "base", 9: "inpainting", 8: "instruct-pix2pix"},
)

# The single file has 24 blocks; the context is the output of the 23rd, passed through the final norm.
SD2 = Family(
    name="sd2",
    title="Stable Diffusion 2",
    locations=(
        ComponentLocation(
            "unet",
            "model.diffusion_model.",
            "original",
            UNetSpec(heads=None, head_channels=64, context_dim=1024, linear_projection=True),
        ),
        ComponentLocation("vae", "first_stage_model.", "original", VaeSpec()),
        ComponentLocation("text_encoder", "cond_stage_model.model.", "openclip", OPENCLIP_H),
    ),
    text=TextRecipe(encoders=(EncoderRecipe("text_encoder", pad_token=0, layer=2),)),
    latent_scale=0.18215,
    size=(512, 512),
    variants={4: "base", 9: "inpainting", 5: "depth"},
    leftovers=(
        Drop("depth_model.{rest*}", "MiDaS, which estimates the depth of a picture; depth maps are an input here"),
        Drop("embedder.{rest*}", "the image encoder of the unCLIP variant"),
        Drop("noise_augmentor.{rest*}", "the noise augmentation of the unCLIP variant"),
    ),
)

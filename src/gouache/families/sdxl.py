"""Stable Diffusion XL (Podell et al. 2023): the base model with its variants, and the refiner."""

from __future__ import annotations

from gouache.families.family import ComponentLocation, Family
from gouache.families.sd import CLIP_L
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec
from gouache.prompts.recipe import EncoderRecipe, TextRecipe

OPENCLIP_BIGG = TextSpec(width=1280, layers=32, heads=20, mlp_width=5120, activation="gelu", projection=1280)

SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    locations=(
        ComponentLocation(
            "unet",
            "model.diffusion_model.",
            "original",
            UNetSpec(
                channel_mult=(1, 2, 4),
                attention_depth=(0, 2, 10),
                middle_depth=10,
                heads=None,
                head_channels=64,
                context_dim=2048,
                linear_projection=True,
                vector_channels=2816,  # pooled text 1280, and six numbers embedded in 256 each
            ),
        ),
        ComponentLocation("vae", "first_stage_model.", "original", VaeSpec()),
        ComponentLocation("text_encoder", "conditioner.embedders.0.transformer.", "transformers", CLIP_L),
        ComponentLocation("text_encoder_2", "conditioner.embedders.1.model.", "openclip", OPENCLIP_BIGG),
    ),
    text=TextRecipe(
        encoders=(
            EncoderRecipe("text_encoder", layer=2, final_norm=False),
            EncoderRecipe("text_encoder_2", pad_token=0, layer=2, final_norm=False),
        ),
        pooled="text_encoder_2",
        size_ids="sdxl",
        zero_empty_negative=True,
    ),
    latent_scale=0.13025,
    size=(1024, 1024),
    variants={4: "base", 9: "inpainting", 8: "instruct-pix2pix"},
)

REFINER = Family(
    name="sdxl-refiner",
    title="Stable Diffusion XL refiner",
    locations=(
        ComponentLocation(
            "unet",
            "model.diffusion_model.",
            "original",
            UNetSpec(
                channels=384,
                attention_depth=(0, 4, 4, 0),
                middle_depth=4,
                heads=None,
                head_channels=64,
                context_dim=1280,
                linear_projection=True,
                vector_channels=2560,  # pooled text 1280, and five numbers embedded in 256 each
            ),
        ),
        ComponentLocation("vae", "first_stage_model.", "original", VaeSpec()),
        # The same encoder as the base model's second, and named like it, although it is the only one here.
        ComponentLocation("text_encoder_2", "conditioner.embedders.0.model.", "openclip", OPENCLIP_BIGG),
    ),
    text=TextRecipe(
        encoders=(EncoderRecipe("text_encoder_2", pad_token=0, layer=2, final_norm=False),),
        pooled="text_encoder_2",
        size_ids="refiner",
    ),
    latent_scale=0.13025,
    size=(1024, 1024),
    variants={4: "base"},
)

"""Stable Video Diffusion (Blattmann et al. 2023), image to video. Recognised, but not implemented yet.

svd and svd_xt differ in the number of frames they were trained on, which is not stored in their files.
"""

from __future__ import annotations

from gouache.families.family import ComponentLocation, Family, NoiseLevels
from gouache.layouts.rules import Drop
from gouache.nn.spec import VaeSpec

_TEXT = "a leftover of CLIP's text encoder; this line uses only the image encoder"

SVD = Family(
    name="svd",
    title="Stable Video Diffusion",
    locations=(
        ComponentLocation("unet", "model.diffusion_model.", "original", None),
        ComponentLocation("vae", "first_stage_model.", "original", None),
        ComponentLocation("image_encoder", "conditioner.embedders.0.open_clip.model.visual.", "openclip", None),
        # An ordinary autoencoder encodes the first frame; its latent is not scaled.
        ComponentLocation("frame_vae", "conditioner.embedders.3.encoder.", "original", VaeSpec()),
    ),
    text=None,
    latent_scale=0.18215,
    size=(1024, 576),
    variants={8: "image to video"},
    prediction="v",
    levels=NoiseLevels("edm", 0.002, 700.0),
    leftovers=tuple(
        Drop(f"conditioner.embedders.0.open_clip.model.{name}", _TEXT)
        for name in (
            "token_embedding.weight",
            "positional_embedding",
            "ln_final.{leaf}",
            "text_projection",
            "logit_scale",
            "attn_mask",
        )
    ),
)

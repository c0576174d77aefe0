"""The categories by which the library sorts models, and the folder for each. Coarser than the kinds of `identify`."""

from __future__ import annotations

from gouache.layouts.adapters import FORMATS

# Folder below a web UI's models/ -> category. Gouache installs models into folders of the same names.
A1111 = {
    "Stable-diffusion": "checkpoint",
    "VAE": "vae",
    "VAE-approx": "preview decoder",
    "Lora": "lora",
    "LyCORIS": "lora",
    "embeddings": "embedding",
    "hypernetworks": "hypernetwork",
    "ControlNet": "controlnet",
    "ESRGAN": "upscaler",
    "RealESRGAN": "upscaler",
    "SwinIR": "upscaler",
    "text_encoder": "text encoder",
    "unet": "unet",
    "BLIP": "captioner",
    "torch_deepdanbooru": "captioner",
}
FOLDERS = {category: folder for folder, category in reversed(A1111.items())}
_KINDS = {
    "diffusers folder": "checkpoint",
    "t2i-adapter": "controlnet",
    "text_encoder": "text encoder",
    "text_encoder_2": "text encoder",
} | dict.fromkeys(FORMATS, "lora")


def category(kind: str) -> str:
    """The category of a kind that `identify` returns; the kind itself where it has the same name."""
    return _KINDS.get(kind, kind)

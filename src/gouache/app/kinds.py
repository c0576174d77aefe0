"""The kinds by which a library is sorted, and the folders for each: coarser than what `identify` tells."""

from __future__ import annotations

from gouache.layouts.adapters import FORMATS

# Folder -> kind, below a web UI's models/; Gouache places what it installs in the same manner.
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
FOLDERS = {kind: folder for folder, kind in reversed(A1111.items())}
_FINER = {
    "diffusers folder": "checkpoint",
    "t2i-adapter": "controlnet",
    "text_encoder": "text encoder",
    "text_encoder_2": "text encoder",
} | dict.fromkeys(FORMATS, "lora")


def shelf(kind: str) -> str:
    """The kind under which the library keeps what `identify` calls `kind`."""
    return _FINER.get(kind, kind)

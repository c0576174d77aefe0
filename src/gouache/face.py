"""The public names, gathered from where they are defined."""

from __future__ import annotations

from gouache.adapters.strength import Strength
from gouache.app.loading import load
from gouache.app.model import Model
from gouache.app.training.api import train
from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.guidance import cfg
from gouache.diffusion.noise import Noise
from gouache.diffusion.samplers.catalog import sampler
from gouache.diffusion.spacing import sigmas
from gouache.errors import GouacheError
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.generate.picture import Picture
from gouache.generate.request import Request
from gouache.images.pixels import to_pictures
from gouache.model.attach import Attached

__all__ = [
    "Attached", "Conditioning", "GouacheError", "Model", "Noise", "Picture", "Request", "Strength", "cfg", "identify",
    "load", "open_model", "sampler", "sigmas", "to_pictures", "train",
]  # fmt: skip

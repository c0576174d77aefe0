"""The public names, gathered from where they are defined."""

from __future__ import annotations

from gouache.adapters.strength import Strength
from gouache.app.loading import load
from gouache.app.model import Model
from gouache.errors import GouacheError
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.generate.picture import Picture
from gouache.generate.request import Request
from gouache.model.attach import Attached

__all__ = ["Attached", "GouacheError", "Model", "Picture", "Request", "Strength", "identify", "load", "open_model"]

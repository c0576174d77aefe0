"""Gouache: Stable Diffusion as one package.

    import gouache
    model = gouache.load("model.safetensors")  # any format, or "mini"
    for picture in model.paint("a cat", steps=20, seed=7):
        picture.save("cat.png")

These are the public names. Nothing is imported until a name is used, so `import gouache` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gouache.version import __version__

if TYPE_CHECKING:
    from gouache.face import (
        Attached,
        Conditioning,
        GouacheError,
        Model,
        Noise,
        Picture,
        Request,
        Strength,
        cfg,
        identify,
        load,
        open_model,
        sampler,
        sigmas,
        to_pictures,
        train,
    )

__all__ = [
    "Attached", "Conditioning", "GouacheError", "Model", "Noise", "Picture", "Request", "Strength", "__version__",
    "cfg", "identify", "load", "open_model", "sampler", "sigmas", "to_pictures",
    "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gouache' has no attribute {name!r}")
    from gouache import face

    return getattr(face, name)


def __dir__() -> list[str]:
    return sorted(__all__)

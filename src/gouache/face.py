"""What the public face is made of: the rooms below, joined for a caller in Python."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from gouache.app import hashes, machine, names
from gouache.app.settings import Settings, read
from gouache.diffusion.samplers.sampler import OnStep
from gouache.errors import GouacheError
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.generate import run
from gouache.generate.picture import Picture
from gouache.generate.request import Request
from gouache.model import load as loading
from gouache.model import model, residency
from gouache.nn.spec import UNetSpec

__all__ = ["GouacheError", "Model", "Picture", "Request", "identify", "load", "open_model"]


class Model(model.Model):
    """A loaded model that paints. All of `gouache.model.model.Model` is here too: `unet`, `vae`, `denoiser`, ..."""

    settings: Settings

    def paint(self, prompt: str | Request, *, on_step: OnStep | None = None, **knobs: Any) -> Iterator[Picture]:
        """Paint `prompt`; `knobs` are the fields of `Request`, over those of one. Pictures come as each is done."""
        base = prompt.to_json() if isinstance(prompt, Request) else {"prompt": prompt}
        request = Request.from_json({**base, **knobs})
        return run.paint(self, request, model_hash=self.sha256, on_step=on_step)

    @property
    def sha256(self) -> str:
        """The file's hash, as sites publish it."""
        return hashes.sha256(self.file, self.settings)


def load(
    name: str | Path = names.DEFAULT,
    *,
    device: str | None = None,
    dtype: str | None = None,
    prediction: str | None = None,
    family: str | None = None,
    settings: Settings | None = None,
) -> Model:
    """Load a model by path or name; "mini" is the one inside the package.

    `device` defaults to the best there is, `dtype` ("fp32", "bf16", "fp16") to the fastest measured on it.
    `prediction` ("eps", "v") and `family` overrule what the file seems to be. Raises GouacheError.
    """
    settings = settings or read()
    file = open_model(names.resolve(str(name), settings))
    place = residency.device(device or settings.device)
    found = identify(file, prediction=prediction, family=family)
    wanted = dtype or settings.dtype
    kind = residency.dtype(wanted) if wanted else machine.best_dtype(place, _channels(found), settings)
    loaded = cast(Model, loading.load(file, found, device=place, dtype=kind, kind=Model))
    loaded.settings = settings
    return loaded


def _channels(found: Found) -> int:
    unet = found.components.get("unet")
    return unet.spec.channels if unet is not None and isinstance(unet.spec, UNetSpec) else residency.CHANNELS

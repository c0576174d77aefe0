"""Loading a model by name: file, family, device, dtype and autoencoder are found, then the networks are filled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from gouache.app import machine, names
from gouache.app.model import Model
from gouache.app.settings import Settings, read
from gouache.app.vae import choose_vae, replacement
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.model import load as loading
from gouache.model import residency
from gouache.model.vae import DamagedVae
from gouache.nn.spec import UNetSpec


def load(
    name: str | Path = names.DEFAULT,
    *,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    prediction: str | None = None,
    family: str | None = None,
    vae: str | Path | None = None,
    settings: Settings | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Model:
    """Load a model by path or name; "mini" is the one inside the package.

    `device` defaults to the best there is, `dtype` ("fp32", "bf16", "fp16") to the fastest measured on it; on
    torch.device("meta") no weight is read.
    `prediction` ("eps", "v") and `family` ("sd1", "sd2", "sdxl") override what the file seems to be. `vae` is another
    file's autoencoder, or "none" for the model's own in any case; by default ("automatic") the file that the library
    notes for the model or that is named like it, else its own, else, if it has none or a damaged one, the first in the
    library that fits; `on_note` is called with the reason. Raises GouacheError.
    """
    settings = settings or read()
    file = open_model(names.resolve(str(name), settings))
    target = device if isinstance(device, torch.device) else residency.device(device or settings.device)
    found = identify(file, prediction=prediction, family=family)
    wanted = dtype or settings.dtype
    chosen_dtype = residency.dtype(wanted) if wanted else machine.best_dtype(target, _channels(found), settings)

    def note(text: str) -> None:
        if text and on_note is not None:
            on_note(text)

    def filled(path: Path | None) -> Model:
        other = None
        if path is not None:
            opened = open_model(path)
            other = opened, identify(opened)
        return loading.load(file, found, device=target, dtype=chosen_dtype, vae=other, model_class=Model)

    chosen = choose_vae(file, found, None if vae is None else str(vae), settings)
    note(chosen.note)
    try:
        model = filled(chosen.path)
    except DamagedVae as damage:
        if not chosen.replaceable:
            raise
        chosen = replacement(found, str(damage), settings)
        note(chosen.note)
        model = filled(chosen.path)
    model.settings = settings
    return model


def _channels(found: Found) -> int:
    unet = found.components.get("unet")
    return unet.spec.channels if unet is not None and isinstance(unet.spec, UNetSpec) else residency.CHANNELS

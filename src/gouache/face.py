"""What the public face is made of: the rooms below, joined for a caller in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from gouache.adapters.attach import How
from gouache.adapters.strength import Strength
from gouache.app import hashes, machine, names
from gouache.app.settings import Settings, read
from gouache.app.shelf import LibraryShelf
from gouache.app.vae import choose_vae
from gouache.diffusion.samplers.sampler import OnStep
from gouache.errors import GouacheError
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.generate import run
from gouache.generate.picture import Picture
from gouache.generate.request import Request
from gouache.model import load as loading
from gouache.model import model, residency
from gouache.model.splice import Attached, attach
from gouache.model.vae import load_vae, must_fit
from gouache.nn.spec import UNetSpec

__all__ = ["Attached", "GouacheError", "Model", "Picture", "Request", "Strength", "identify", "load", "open_model"]


class Model(model.Model):
    """A loaded model that paints. All of `gouache.model.model.Model` is here too: `unet`, `vae`, `denoiser`, ..."""

    settings: Settings

    def __setattr__(self, name: str, value: Any) -> None:
        """`model.vae = "vae.safetensors"` opens that file; a module is taken as it is."""
        if name == "vae" and isinstance(value, str | Path):
            file = open_model(names.resolve(str(value), self.settings, "vae"))
            value = load_vae(file, identify(file), self.device, self.dtype)
            must_fit(file.path, value, self.vae)
            super().__setattr__("vae_file", file)
        elif name == "vae":
            super().__setattr__("vae_file", None)  # until its caller says where it is from
        super().__setattr__(name, value)

    def paint(
        self,
        prompt: str | Request,
        *,
        on_step: OnStep | None = None,
        on_spliced: run.OnSpliced | None = None,
        **knobs: Any,
    ) -> Iterator[Picture]:
        """Paint `prompt`; `knobs` are the fields of `Request`, over those of one. Pictures come as each is done."""
        base = prompt.to_json() if isinstance(prompt, Request) else {"prompt": prompt}
        request = Request.from_json({**base, **knobs})
        shelf = LibraryShelf(self.settings)
        return run.paint(self, request, model_hash=self.sha256, shelf=shelf, on_step=on_step, on_spliced=on_spliced)

    def attach(
        self, name: str | Path | ModelFile, strength: float | Strength = 1.0, *, how: How | None = None
    ) -> Attached:
        """Splice a LoRA, embedding or hypernetwork in, whole or not at all, until its `detach`.

        `name` is a path or of the library. `strength` may be a `Strength`: apart for U-Net and text encoders, by block,
        by step. Raises GouacheError where it does not fit this model.
        """
        file = name
        if not isinstance(file, ModelFile):
            file = open_model(names.resolve(str(name), self.settings))
        return attach(self, file, strength, how=how)

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
    vae: str | Path | None = None,
    settings: Settings | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Model:
    """Load a model by path or name; "mini" is the one inside the package.

    `device` defaults to the best there is, `dtype` ("fp32", "bf16", "fp16") to the fastest measured on it.
    `prediction` ("eps", "v") and `family` overrule what the file seems to be. `vae` is another file's autoencoder,
    "none" for the model's own whatever it is like; else ("automatic") what stands beside the file as its own, and where
    the model has none, or a damaged one, the first that fits in the library, of which `on_note` is told. Raises
    GouacheError.
    """
    settings = settings or read()
    file = open_model(names.resolve(str(name), settings))
    place = residency.device(device or settings.device)
    found = identify(file, prediction=prediction, family=family)
    wanted = dtype or settings.dtype
    kind = residency.dtype(wanted) if wanted else machine.best_dtype(place, _channels(found), settings)
    chosen = choose_vae(file, found, None if vae is None else str(vae), settings)
    if chosen.note and on_note is not None:
        on_note(chosen.note)
    other = None
    if chosen.path is not None:
        opened = open_model(chosen.path)
        other = opened, identify(opened)
    loaded = cast(Model, loading.load(file, found, device=place, dtype=kind, vae=other, kind=Model))
    loaded.settings = settings
    return loaded


def _channels(found: Found) -> int:
    unet = found.components.get("unet")
    return unet.spec.channels if unet is not None and isinstance(unet.spec, UNetSpec) else residency.CHANNELS

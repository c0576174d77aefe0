"""Model: what `gouache.load` returns: a loaded model that paints, with files found by name in the library."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Unpack

from torch import nn

from gouache.adapters.attach import How
from gouache.adapters.strength import Strength
from gouache.app import names
from gouache.app.hashing import BackgroundHash, OnWork
from gouache.app.settings import Settings
from gouache.app.sources import LibrarySource
from gouache.diffusion.samplers.sampler import OnStep
from gouache.errors import FileError, RequestError, printable
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.generate import run
from gouache.generate.picture import Picture
from gouache.generate.request import Options, Request
from gouache.model import model
from gouache.model.attach import Attached, attach
from gouache.model.vae import AnyVae, check_compatible, load_vae


class Model(model.Model):
    """A loaded model that paints. It has everything of `gouache.model.model.Model`: `unet`, `vae`, `denoiser`, ...

    Threads may share it. While an iteration of `paint` is open, its adapters and VAE may be on the model; to use or
    save the networks yourself meanwhile, do so within `with model.exclusive():`, where they are not.
    """

    settings: Settings
    _refiner: tuple[str, model.Model] | None = None

    @property
    def vae(self) -> AnyVae:
        return self.core.vae

    @vae.setter
    def vae(self, vae: AnyVae | str | Path) -> None:
        """A module, or the path or name of a file."""
        if not isinstance(vae, str | Path | nn.Module):
            raise RequestError("vae", f"{printable(repr(vae), 40)} is neither a file, by path or name, nor a module")
        self.vae_file = None
        if isinstance(vae, str | Path):
            file = open_model(names.resolve(str(vae), self.settings, "vae"))
            vae = load_vae(file, identify(file), self.device, self.dtype)
            check_compatible(file.path, vae, self.vae)
            self.vae_file = file
        self.core.vae = vae

    def paint(
        self,
        prompt: str | Request,
        /,
        *,
        on_step: OnStep | None = None,
        on_attached: run.OnAttached | None = None,
        on_hash: OnWork | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Picture]:
        """Generate pictures of `prompt`; `options` are the other fields of `Request`, and replace those of a Request.

        Pictures are yielded as each is done. `on_step` is called after each sampling step, `on_attached` with the
        adapter files of this request, `on_hash` with (what, done, total) while the hash of a model file that was never
        hashed before is computed; that runs beside the first steps. Several threads may paint with one model.

        Raises GouacheError before the first step for whatever can be known then.
        """
        request = _request(prompt, options)
        if request.refiner is not None:
            names.resolve(request.refiner, self.settings, setting="refiner")  # before the first step
        hash_of = partial(self._hash_of, on_hash=on_hash)
        self._hash.start()
        return run.paint(
            self,
            request,
            hash_of=hash_of,
            source=LibrarySource(self.settings),
            load=self._load_refiner,
            on_step=on_step,
            on_attached=on_attached,
        )

    def attach(
        self, name: str | Path | ModelFile, strength: float | Strength = 1.0, *, how: How | None = None
    ) -> Attached:
        """Attach a LoRA, embedding or hypernetwork, whole or not at all, until its `detach`.

        `name` is a path or a name in the library. `strength` may be a `Strength`: different for U-Net and text
        encoders, by block, by step. Raises GouacheError if it does not fit this model.
        """
        file = name if isinstance(name, ModelFile) else open_model(names.resolve(str(name), self.settings))
        return attach(self, file, strength, how=how)

    @property
    def sha256(self) -> str:
        """The hash of the model file, as sites publish it; computed at first use if it was never hashed before."""
        return self._hash.result()

    @cached_property
    def _hash(self) -> BackgroundHash:
        return BackgroundHash(self.file, self.settings)

    def _hash_of(self, other: model.Model, on_hash: OnWork | None) -> str | None:
        """For a recipe; None if the file cannot be read any more: finished pictures are not lost for that."""
        try:
            return (other if isinstance(other, Model) else self)._hash.result(on_hash)
        except FileError:
            return None

    def _load_refiner(self, name: str) -> model.Model:
        """Kept until another one is asked for."""
        from gouache.app.loading import load
        from gouache.model.residency import dtype_name

        with self.lock:
            if self._refiner is not None and self._refiner[0] == name:
                return self._refiner[1]
            self._refiner = None  # its memory is free before the next one is loaded
            refiner = load(name, device=str(self.device), dtype=dtype_name(self.dtype), settings=self.settings)
            self._refiner = name, refiner
            return refiner


def _request(prompt: str | Request, options: Options) -> Request:
    if isinstance(prompt, Request) and not options:
        return prompt
    if isinstance(prompt, Request):
        return prompt.changed(dict(options))
    return Request.from_json({"prompt": prompt, **options})

"""Model: the networks of one checkpoint, assembled: a core, a text conditioner, and the adapters attached to both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from gouache.adapters.attach import Adapters
from gouache.adapters.embedding import Embeddings
from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.denoiser import Denoiser, Prediction
from gouache.diffusion.schedule import Schedule
from gouache.errors import ModelError, RequestError, printable
from gouache.families.family import Family
from gouache.families.found import Found
from gouache.files.assign import cast
from gouache.files.record import ModelFile
from gouache.model.core import Core, NotFinite, is_finite, is_finite_conditioning, is_picture
from gouache.model.text import TextConditioner
from gouache.nn.clip_text import ClipText
from gouache.nn.spec import TextSpec, UNetSpec
from gouache.nn.unet import UNet
from gouache.nn.vae import Autoencoder
from gouache.nn.vae_tiny import TinyAutoencoder
from gouache.prompts.encode import Emphasis
from gouache.prompts.recipe import TextRecipe
from gouache.prompts.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gouache.model.attach import Attached
    from gouache.model.lease import Lease

T = TypeVar("T")

CFG_KEY, DEFAULT_CFG = "gouache.cfg", 7.0


@dataclass(eq=False, repr=False)
class Model:
    """A loaded model. `unet`, `vae` and `text_encoders` are plain modules; changing them changes the pictures.

    `vae_file` is the source of the autoencoder if that is not `file`. `attached` lists the adapters
    (`model.attach`). Several threads may paint with one model: each request leases it (`model.lease`). Its methods
    work under autograd; parameters do not require gradients until the caller says so. `unloaded` are the stages whose
    weights are not in memory, see `unload`.
    """

    file: ModelFile
    found: Found
    family: Family
    core: Core
    text: TextConditioner
    vae_file: ModelFile | None = None
    attached: list[Attached] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    holder: Lease | None = None
    spare: Lease | None = None
    unloaded: set[str] = field(default_factory=set)

    def __reduce_ex__(self, protocol: object) -> str:
        raise RequestError("model", f"cannot be pickled or copied; load {printable(str(self.file.path))} once more")

    @cached_property
    def adapters(self) -> Adapters:
        """The adapters on the weights of the U-Net and the text encoders."""
        return Adapters({"unet": self.unet, **self.text_encoders}, self.restore)

    def restore(self, component: str, name: str) -> Tensor:
        """The tensor `name` of "unet" or a text encoder as it was loaded: read from the file again and cast."""
        origin = self.found.component(component).origins[name]
        return cast(origin.tensor(self.file.tensor), self.dtype, self.device)

    @property
    def unet(self) -> UNet:
        return self.core.unet

    @property
    def vae(self) -> Autoencoder | TinyAutoencoder:
        return self.core.vae

    @vae.setter
    def vae(self, vae: Autoencoder | TinyAutoencoder) -> None:
        self.core.vae = vae

    @property
    def text_encoders(self) -> Mapping[str, ClipText]:
        return self.text.encoders

    @property
    def text_recipe(self) -> TextRecipe:
        return self.text.recipe

    @property
    def tokenizer(self) -> Tokenizer:
        return self.text.tokenizer

    @property
    def embeddings(self) -> Embeddings:
        return self.text.embeddings

    @property
    def schedule(self) -> Schedule:
        return self.core.schedule

    @property
    def prediction(self) -> Prediction:
        """What the U-Net predicts: "eps" or "v"."""
        return self.core.prediction

    @property
    def latent_scale(self) -> float:
        return self.core.latent_scale

    @property
    def device(self) -> torch.device:
        return self.core.device

    @property
    def dtype(self) -> torch.dtype:
        return self.core.dtype

    @property
    def upcast(self) -> list[str]:
        """The stages that gave NaN in `dtype` and now run in float32."""
        return self.core.upcast

    @property
    def specs(self) -> dict[str, UNetSpec | TextSpec]:
        """The specs of the networks that adapters can change."""
        return {"unet": self.unet.spec, **{name: encoder.spec for name, encoder in self.text_encoders.items()}}

    @property
    def text_widths(self) -> dict[str, int]:
        """The width of a token's vector, by encoder."""
        return self.text.widths

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels that the weights were trained on, as far as the file or its family says."""
        return self.found.size.value if self.found.size is not None else self.family.size

    @property
    def cfg(self) -> float:
        """The guidance scale that suits the weights: what the file's metadata states under `gouache.cfg`, else 7."""
        try:
            stated = float(self.file.metadata.get(CFG_KEY, ""))
        except ValueError:
            return DEFAULT_CFG
        return stated if 0 <= stated <= 1000 else DEFAULT_CFG

    @property
    def variant(self) -> str:
        """The use of the U-Net's input channels: "base", "inpainting", "instruct-pix2pix", "depth"."""
        return self.found.variant.value or "base"

    def encode_prompts(
        self,
        texts: Sequence[str],
        *,
        negative: bool = False,
        clip_skip: int | None = None,
        size: tuple[int, int] | None = None,
        emphasis: Emphasis = "original",
        aesthetic: float | None = None,
    ) -> Conditioning:
        """The conditioning of `texts`, one row each. `size` (width, height) matters to SDXL only; see `prompts.encode`.

        Raises RequestError for a single string, which would be read as a list of its letters.
        """
        if isinstance(texts, str):
            raise RequestError("texts", f"{texts[:40]!r} is one string; give a list of prompts, [{texts[:40]!r}]")

        def compute() -> Conditioning:
            return self.text.encode(
                texts,
                size=size or self.size,
                device=self.device,
                negative=negative,
                clip_skip=clip_skip,
                emphasis=emphasis,
                aesthetic=aesthetic,
            )

        return self._finite("text encoder", compute, is_finite_conditioning)

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """x (B, C, h, w) at noise level sigma (a scalar or (B,)) -> x0, a scaled latent.

        x is in the variance-exploding scale x0 + sigma * noise.
        """
        return self.denoiser(conditioning)(x, sigma)

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        """(x, sigma) -> x0 with the conditioning bound: the argument of every sampler and of training."""
        return self.core.denoiser(conditioning)

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> latents (B, C, H/8, W/8), scaled, float32: the mean, not a sample."""
        return self._finite("VAE", lambda: self.core.encode(images), is_finite)

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w), scaled -> images (B, 3, H, W), float32, about [-1, 1], not clamped."""
        return self._finite("VAE", lambda: self.core.decode(latents), is_picture)

    def sampled(self, run: Callable[[], Tensor]) -> Tensor:
        """The latents of a sampling run, checked for NaN like every other stage."""
        return self._finite("U-Net", run, is_finite)

    def modules_of(self, stage: str) -> list[nn.Module]:
        """The networks of a stage: "text encoder", "U-Net" or "VAE"."""
        return {"text encoder": [*self.text_encoders.values()], "U-Net": [self.unet], "VAE": [self.vae]}[stage]

    def widen(self, stage: str) -> None:
        """Compute `stage` in float32 from now on."""
        with torch.inference_mode(False), torch.no_grad():
            for module in self.modules_of(stage):
                module.float()
        self.upcast.append(stage)

    def narrow(self, stage: str) -> None:
        """Compute `stage` in the model's dtype again. Exact: float32 holds every value of the narrower dtypes."""
        with torch.inference_mode(False), torch.no_grad():
            for module in self.modules_of(stage):
                module.to(self.dtype)
        self.upcast.remove(stage)

    def unload(self, stage: str) -> None:
        """Free the weights of "text encoder", "U-Net" or "VAE" until `reload`; none may be trained or folded into.

        What encodes with a stage reloads it first; the U-Net has to be reloaded by who unloads it.
        """
        with self.lock:
            for module in self.modules_of(stage):
                module.to("meta")
            self.unloaded.add(stage)

    def reload(self, stage: str) -> None:
        """Read the weights of an unloaded stage from the file again; they are equal bit for bit."""
        from gouache.model.load import fill

        with self.lock, torch.inference_mode(False), torch.no_grad():
            if stage in self.unloaded:
                fill(self, stage)
                if stage in self.upcast:
                    for module in self.modules_of(stage):
                        module.float()
                self.unloaded.remove(stage)

    def exclusive(self) -> Lease:
        """A lease without adapters: within it, no other request uses the model and none of its adapters is attached."""
        from gouache.model.lease import Lease

        return Lease(self)

    def _finite(self, stage: str, compute: Callable[[], T], valid: Callable[[T], bool]) -> T:
        self.reload(stage)
        try:
            return self.core.finite(stage, self.modules_of(stage), compute, valid)
        except NotFinite:
            pass
        if self.attached and stage != "VAE":
            names = ", ".join(each.name for each in self.attached)
            raise ModelError(
                f"the {stage} gives NaN or infinite results even in float32 with {names} attached; nothing was saved. "
                f"Lower the strength, or leave it out"
            )
        file = self.vae_file if stage == "VAE" and self.vae_file is not None else self.file
        raise ModelError(
            f"{printable(str(file.path))}: the {stage} gives NaN, infinite or black results even in float32, so its "
            f"weights are damaged or were identified wrongly; nothing was saved. Use another copy of the file"
        )

    def __repr__(self) -> str:
        from gouache.model.residency import dtype_name

        parts = [
            self.family.title,
            self.variant,
            f"{self.prediction}-prediction",
            str(self.device),
            dtype_name(self.dtype),
        ]
        if self.attached:
            parts.append(f"{len(self.attached)} attached")
        return f"<{type(self).__name__} {self.file.path.stem}: {', '.join(parts)}>"

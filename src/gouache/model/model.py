"""Model: the networks of one checkpoint, put together, with what their family adds.

It turns prompts into conditioning, latents into pictures and back, and is what a sampler's denoiser asks. Latents are
scaled here (unit variance, roughly); only the autoencoder itself sees them unscaled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gouache.adapters.attach import Layers
from gouache.adapters.embedding import Words
from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.denoiser import Denoiser, Prediction
from gouache.diffusion.schedule import Schedule
from gouache.errors import ModelError
from gouache.families.family import Family
from gouache.families.found import Found
from gouache.files.assign import cast
from gouache.files.record import ModelFile
from gouache.nn.clip_text import ClipText
from gouache.nn.spec import TextSpec, UNetSpec
from gouache.nn.unet import UNet
from gouache.nn.vae import Autoencoder
from gouache.nn.vae_tiny import TinyAutoencoder
from gouache.prompts.encode import Emphasis, encode
from gouache.prompts.recipe import TextRecipe
from gouache.prompts.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(eq=False)
class Model:
    """A loaded model. `unet`, `vae` and `text_encoders` are plain modules; changing them changes what is painted.

    `vae_file` is where the autoencoder is from, if not from `file`. `embeddings` {name: {encoder: (vectors, D)}} are
    words that prompts can use besides the vocabulary, `attached` what is spliced in (`model.splice`). `upcast` lists
    the stages that gave NaN in `dtype` and have been in float32 since.
    """

    file: ModelFile
    found: Found
    family: Family
    unet: UNet
    vae: Autoencoder | TinyAutoencoder
    text_encoders: Mapping[str, ClipText]
    text_recipe: TextRecipe
    tokenizer: Tokenizer
    schedule: Schedule
    prediction: Prediction
    latent_scale: float
    device: torch.device
    dtype: torch.dtype
    vae_file: ModelFile | None = None
    embeddings: Words = field(default_factory=Words)
    attached: list[Any] = field(default_factory=list)
    upcast: list[str] = field(default_factory=list)

    @cached_property
    def layers(self) -> Layers:
        """The adapters on the U-Net and the text encoders."""
        return Layers({"unet": self.unet, **self.text_encoders}, self.restore)

    def restore(self, component: str, name: str) -> Tensor:
        """The tensor `name` of "unet" or a text encoder as it was loaded: read from the file again, cast the same."""
        origin = self.found.component(component).origins[name]
        return cast(origin.tensor(self.file.tensor), self.dtype, self.device)

    @property
    def specs(self) -> dict[str, UNetSpec | TextSpec]:
        """What adapters can act on."""
        return {"unet": self.unet.spec, **{name: encoder.spec for name, encoder in self.text_encoders.items()}}

    @property
    def text_widths(self) -> dict[str, int]:
        """How wide a token's vector is, by encoder."""
        return {each.name: self.text_encoders[each.name].spec.width for each in self.text_recipe.encoders}

    @property
    def vae_scale(self) -> float:
        """What turns the autoencoder's latents into the U-Net's."""
        return 1.0 if isinstance(self.vae, TinyAutoencoder) else self.latent_scale

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels that the weights were trained on, as far as the file or its family tells."""
        return self.found.size.value if self.found.size is not None else self.family.size

    @property
    def variant(self) -> str:
        """What the U-Net's input channels are for: "base", "inpainting", "instruct-pix2pix", "depth"."""
        return self.found.variant.value or "base"

    @torch.inference_mode()
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
        """What `texts` tell the U-Net. `size` (width, height) matters to SDXL alone; see `prompts.encode`."""
        usual = 2.5 if negative else 6.0

        def attempt() -> Conditioning:
            return encode(
                texts,
                self.tokenizer,
                self.text_encoders,
                self.text_recipe,
                clip_skip=clip_skip,
                size=size or self.size,
                emphasis=emphasis,
                negative=negative,
                aesthetic=usual if aesthetic is None else aesthetic,
                embeddings=self.embeddings,
                device=self.device,
            )

        return self._finite("text encoder", list(self.text_encoders.values()), attempt, _conditioning_is_finite)

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The picture x0 that the U-Net sees in x (B, C, h, w) at level sigma (a scalar or (B,)), told `conditioning`.

        A latent, scaled; x is in the variance-exploding scale x0 + sigma * noise.
        """
        return self.denoiser(conditioning)(x, sigma)

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        """(x, sigma) -> x0 with the conditioning bound: what any sampler of `diffusion.samplers` takes."""
        kind = next(self.unet.parameters()).dtype
        told = conditioning.to(self.device, kind)

        @torch.inference_mode()
        def network(x: Tensor, t: Tensor) -> Tensor:
            x = x.to(kind)
            if told.concat is not None:
                x = torch.cat([x, told.concat], dim=1)
            return self.unet(x, t.to(self.device), told.context, told.vector)

        return Denoiser(network, self.schedule, self.prediction)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> latents (B, C, H/8, W/8), scaled, float32: the mean, without chance."""

        def attempt() -> Tensor:
            kind = next(self.vae.parameters()).dtype
            return self.vae.encode(images.to(self.device, kind)).mean.float() * self.vae_scale

        return self._finite("VAE", [self.vae], attempt, _is_finite)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w), scaled -> images (B, 3, H, W), float32, about [-1, 1] and not clamped."""

        def attempt() -> Tensor:
            kind = next(self.vae.parameters()).dtype
            # One by one: the decoder's feature maps are the largest there are, and a batch gains nothing.
            rows = [self.vae.decode((row / self.vae_scale).to(self.device, kind)[None]) for row in latents]
            return torch.cat(rows).float()

        return self._finite("VAE", [self.vae], attempt, _is_a_picture)

    def _finite(self, stage: str, modules: list[nn.Module], attempt: Callable[[], T], good: Callable[[T], bool]) -> T:
        """What `attempt` gives; again in float32 where that is not finite, and a ModelError where it still is not."""
        result = attempt()
        if good(result):
            return result
        if any(parameter.dtype != torch.float32 for module in modules for parameter in module.parameters()):
            self.widen(stage)
            result = attempt()
            if good(result):
                return result
        if self.attached and stage != "VAE":
            names = ", ".join(each.name for each in self.attached)
            raise ModelError(
                f"the {stage} gives NaN or infinite results even in float32 with {names} on it; nothing was saved"
            )
        file = self.vae_file if stage == "VAE" and self.vae_file is not None else self.file
        raise ModelError(
            f"{file.path}: the {stage} gives NaN, infinite or black results even in float32, so its weights are "
            f"damaged or not what they seem; nothing was saved. Use another copy of the file"
        )

    def widen(self, stage: str) -> None:
        """Compute `stage` ("text encoder", "U-Net" or "VAE") in float32 from now on."""
        for module in {"text encoder": [*self.text_encoders.values()], "U-Net": [self.unet], "VAE": [self.vae]}[stage]:
            module.float()
        self.upcast.append(stage)

    def sampled(self, attempt: Callable[[], Tensor]) -> Tensor:
        """The latent that a sampling run gives, under the same guard as every other stage."""
        return self._finite("U-Net", [self.unet], attempt, _is_finite)


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _is_a_picture(images: Tensor) -> bool:
    """Finite, and none of them black from edge to edge, which is what an overflow leaves behind."""
    return _is_finite(images) and not bool((images <= -1).flatten(1).all(1).any())


def _conditioning_is_finite(conditioning: Conditioning) -> bool:
    return _is_finite(conditioning.context) and (conditioning.vector is None or _is_finite(conditioning.vector))

"""Core: the denoising network and the autoencoder of a model, with the numbers that connect them.

It knows nothing of prompts: what conditions the network arrives as a `Conditioning`, made by a conditioner
(`model.text` for text). Latents are scaled here (to about unit variance); only the autoencoder itself sees them
unscaled. Everything works under autograd; `generate.run` turns it off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.denoiser import Denoiser, Prediction
from gouache.diffusion.schedule import Schedule
from gouache.nn.unet import UNet
from gouache.nn.vae import Autoencoder
from gouache.nn.vae_tiny import TinyAutoencoder

T = TypeVar("T")


class NotFinite(Exception):
    """A stage gives NaN or infinite results even in float32; `model.Model` says of which file."""


@dataclass(eq=False, repr=False)
class Core:
    """`upcast` lists the stages ("text encoder", "U-Net", "VAE") that gave NaN in `dtype` and now run in float32."""

    unet: UNet
    vae: Autoencoder | TinyAutoencoder
    schedule: Schedule
    prediction: Prediction
    latent_scale: float
    device: torch.device
    dtype: torch.dtype
    upcast: list[str] = field(default_factory=list)

    @property
    def vae_scale(self) -> float:
        """The factor from the autoencoder's latents to the U-Net's."""
        return 1.0 if isinstance(self.vae, TinyAutoencoder) else self.latent_scale

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        """(x, sigma) -> x0 with the conditioning bound: the argument of every sampler and of training."""
        dtype = next(self.unet.parameters()).dtype
        parts = conditioning.to(self.device, dtype).parts
        concat = parts.pop("concat", None)

        def network(x: Tensor, t: Tensor) -> Tensor:
            x = x.to(dtype)
            if isinstance(concat, Tensor):
                x = torch.cat([x, concat], dim=1)
            return self.unet(x, t.to(self.device), **parts)  # a part is an argument of the network, by name

        return Denoiser(network, self.schedule, self.prediction)

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> latents (B, C, H/8, W/8), scaled, float32: the mean, not a sample."""
        self._lay_out_vae()
        dtype = next(self.vae.parameters()).dtype
        return self.vae.encode(images.to(self.device, dtype)).mean.float() * self.vae_scale

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w), scaled -> images (B, 3, H, W), float32, about [-1, 1], not clamped."""
        self._lay_out_vae()
        dtype = next(self.vae.parameters()).dtype
        # One by one: the decoder's feature maps are the largest of all, and a batch is not faster.
        rows = [self.vae.decode((row / self.vae_scale).to(self.device, dtype)[None]) for row in latents]
        return torch.cat(rows).float()

    def _lay_out_vae(self) -> None:
        """Convolutions in channels-last: a tenth faster on a CPU. At first use, since it copies mapped weights."""
        if isinstance(self.vae, Autoencoder) and self.vae.decoder.conv_in.weight.is_contiguous():
            with torch.inference_mode(False), torch.no_grad():
                self.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def finite(
        self, stage: str, modules: Iterable[nn.Module], compute: Callable[[], T], valid: Callable[[T], bool]
    ) -> T:
        """The result of `compute`, computed again in float32 if it is not `valid`.

        Raises NotFinite if it still is not.
        """
        result = compute()
        if valid(result):
            return result
        modules = list(modules)
        if any(parameter.dtype != torch.float32 for module in modules for parameter in module.parameters()):
            with torch.inference_mode(False), torch.no_grad():
                for module in modules:
                    module.float()
            self.upcast.append(stage)
            result = compute()
            if valid(result):
                return result
        raise NotFinite(stage)


def is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def is_picture(images: Tensor) -> bool:
    """Finite, and none of them entirely black, which is what an overflow leaves."""
    return is_finite(images) and not bool((images <= -1).flatten(1).all(1).any())


def is_finite_conditioning(conditioning: Conditioning) -> bool:
    return all(is_finite(part) for part in conditioning.parts.values() if isinstance(part, Tensor))

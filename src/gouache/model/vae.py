"""An autoencoder: a model's own, or from another file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gouache.errors import ModelError, printable
from gouache.families.found import Found
from gouache.files.assign import assign
from gouache.files.record import ModelFile
from gouache.layouts.tiny import tiny_names
from gouache.nn.spec import TinyVaeSpec, VaeSpec
from gouache.nn.vae import Autoencoder
from gouache.nn.vae_tiny import TinyAutoencoder

AnyVae = Autoencoder | TinyAutoencoder
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


class DamagedVae(ModelError):
    """The file's autoencoder has weights that cannot be used."""


def load_vae(file: ModelFile, found: Found, device: torch.device | str, dtype: torch.dtype) -> AnyVae:
    """The autoencoder in `file`. Raises ModelError if it has none, DamagedVae if its weights are not finite."""
    tiny = tiny_names(file)
    if tiny is not None:
        return _load_tiny(file, tiny, device, dtype)
    component = found.component("vae")
    if not isinstance(component.spec, VaeSpec):
        raise ModelError(f"{printable(str(file.path))}: its VAE has a form that is not supported")
    with torch.device("meta"):
        vae = Autoencoder(component.spec)
    tensors = {name: _finite(file, name, origin.tensor(file.tensor)) for name, origin in component.origins.items()}
    assign(vae, tensors, device=device, dtype=dtype)
    if dtype != torch.float32:  # in float32 `Core` does so at first use, since it copies mapped weights
        vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return vae.eval()


def check_compatible(path: Path, vae: AnyVae, other: AnyVae) -> None:
    """Raises ModelError if `vae`, from `path`, has other latents than `other`."""
    if (vae.spec.latent_channels, vae.spec.factor) != (other.spec.latent_channels, other.spec.factor):
        raise ModelError(
            f"{printable(str(path))} has latents of {vae.spec.latent_channels} channels at 1/{vae.spec.factor} of the "
            f"size; this model expects {other.spec.latent_channels} channels at 1/{other.spec.factor}"
        )


def _finite(file: ModelFile, name: str, tensor: Tensor) -> Tensor:
    """`tensor`. A damaged VAE is common in merged checkpoints, and shows as a blue or black picture only at the end."""
    where = printable(str(file.path))
    if not tensor.is_floating_point():
        raise DamagedVae(f"{where}: its VAE is damaged, {printable(name)} holds integers, expected floating point")
    # A sum is not finite if any of its terms is not: in float32 that is the fastest test.
    if tensor.dtype == torch.float32 and bool(torch.isfinite(tensor.sum())):
        return tensor
    low, high = (tensor.float() if tensor.element_size() < 2 else tensor).aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise DamagedVae(
            f"{where}: its VAE is damaged, {printable(name)} holds NaN or infinite numbers (pictures come out blue or "
            f"black)"
        )
    return tensor


def _load_tiny(
    file: ModelFile, names: Mapping[str, str], device: torch.device | str, dtype: torch.dtype
) -> TinyAutoencoder:
    shapes = {name: file.tensors[theirs].shape for name, theirs in names.items()}
    where = printable(str(file.path))
    if any(len(shape) != 4 for name, shape in shapes.items() if name.endswith("weight")):
        raise ModelError(f"{where} cannot be used as a TAESD: one of its weights is not a convolution")
    if any(info.dtype not in FLOATS for info in file.tensors.values()):
        raise ModelError(f"{where} cannot be used as a TAESD: it holds integers, expected floating point")
    towers = {name.partition(".")[0] for name in shapes}
    latent, width = 4, 64
    if "decoder.layers.0.weight" in shapes:
        width, latent = shapes["decoder.layers.0.weight"][:2]
    elif "encoder.layers.0.weight" in shapes:
        width = shapes["encoder.layers.0.weight"][0]
        last = max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder."))
        latent = shapes.get(f"encoder.layers.{last}.weight", (latent,))[0]
    spec = TinyVaeSpec(channels=width, latent_channels=latent, encoder="encoder" in towers, decoder="decoder" in towers)
    if not spec.decoder:
        raise ModelError(f"{where} is the encoder of a TAESD; its decoder is needed")
    with torch.device("meta"):
        vae = TinyAutoencoder(spec)
    assign(vae, {name: file.tensor(theirs) for name, theirs in names.items()}, device=device, dtype=dtype)
    return vae.eval()

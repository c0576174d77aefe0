"""An autoencoder from a file of its own, or out of another model, for a model that is loaded or about to be."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gouache.errors import ModelError, printable
from gouache.families.found import Found
from gouache.files.assign import assign
from gouache.files.record import ModelFile
from gouache.layouts.tiny import tiny_names
from gouache.nn.spec import TinyVaeSpec, VaeSpec
from gouache.nn.vae import Autoencoder
from gouache.nn.vae_tiny import TinyAutoencoder

AnyVae = Autoencoder | TinyAutoencoder


def load_vae(file: ModelFile, found: Found, device: torch.device | str, dtype: torch.dtype) -> AnyVae:
    """The autoencoder in `file`. Raises ModelError where it has none, or its weights are damaged."""
    tiny = tiny_names(file)
    if tiny is not None:
        return _load_tiny(file, tiny, device, dtype)
    component = found.component("vae")
    if not isinstance(component.spec, VaeSpec):
        raise ModelError(f"{printable(str(file.path))}: its autoencoder has a form that is not built yet")
    if damage := damaged(file, found):
        raise ModelError(damage)
    with torch.device("meta"):
        vae = Autoencoder(component.spec)
    tensors = {name: origin.tensor(file.tensor) for name, origin in component.origins.items()}
    assign(vae, tensors, device=device, dtype=dtype)
    # A tenth faster on a CPU in float32 too, where the U-Net gains little and stays mapped.
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return vae.eval()


def damaged(file: ModelFile, found: Found) -> str:
    """What is wrong with the numbers of the file's autoencoder, as a line; "" where they are finite."""
    component = found.components.get("vae")
    for name, origin in component.origins.items() if component is not None else ():
        low, high = origin.tensor(file.tensor).aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            return (
                f"{printable(str(file.path))}: its VAE is damaged, {printable(name)} holds NaN or infinite numbers "
                f"(pictures come out blue or black); give another with --vae FILE"
            )
    return ""


def _load_tiny(
    file: ModelFile, names: Mapping[str, str], device: torch.device | str, dtype: torch.dtype
) -> TinyAutoencoder:
    shapes = {name: file.tensors[theirs].shape for name, theirs in names.items()}
    towers = {name.partition(".")[0] for name in shapes}
    latent, width = 4, 64
    if "decoder.layers.0.weight" in shapes:
        width, latent = shapes["decoder.layers.0.weight"][:2]
    elif "encoder.layers.0.weight" in shapes:
        width = shapes["encoder.layers.0.weight"][0]
        last = max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder."))
        latent = shapes[f"encoder.layers.{last}.weight"][0]
    spec = TinyVaeSpec(channels=width, latent_channels=latent, encoder="encoder" in towers, decoder="decoder" in towers)
    if not spec.decoder:
        raise ModelError(f"{printable(str(file.path))} is the encoder of a TAESD; painting takes its decoder")
    with torch.device("meta"):
        vae = TinyAutoencoder(spec)
    assign(vae, {name: file.tensor(theirs) for name, theirs in names.items()}, device=device, dtype=dtype)
    return vae.eval()

"""An autoencoder from a file of its own, or out of another model, for a model that is loaded or about to be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

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
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def load_vae(file: ModelFile, found: Found, device: torch.device | str, dtype: torch.dtype) -> AnyVae:
    """The autoencoder in `file`. Raises ModelError where it has none, or its weights are damaged."""
    tiny = tiny_names(file)
    if tiny is not None:
        return _load_tiny(file, tiny, device, dtype)
    component = found.component("vae")
    if not isinstance(component.spec, VaeSpec):
        raise ModelError(f"{printable(str(file.path))}: its autoencoder has a form that is not built yet")
    if damage := damaged(file, found):
        raise ModelError(f"{damage}; give another with --vae FILE")
    with torch.device("meta"):
        vae = Autoencoder(component.spec)
    tensors = {name: origin.tensor(file.tensor) for name, origin in component.origins.items()}
    assign(vae, tensors, device=device, dtype=dtype)
    # A tenth faster on a CPU in float32 too, where the U-Net gains little and stays mapped.
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return vae.eval()


def must_fit(path: Path, vae: AnyVae, other: AnyVae) -> None:
    """Raises ModelError where `vae`, out of `path`, does not make the latents that `other` makes."""
    if (vae.spec.latent_channels, vae.spec.factor) != (other.spec.latent_channels, other.spec.factor):
        raise ModelError(
            f"{printable(str(path))} makes latents of {vae.spec.latent_channels} channels, 1/{vae.spec.factor} the "
            f"size; this model's have {other.spec.latent_channels}, 1/{other.spec.factor} the size"
        )


def damaged(file: ModelFile, found: Found) -> str:
    """What is wrong with the numbers of the file's autoencoder, as a line; "" where they are finite."""
    component = found.components.get("vae")
    for name, origin in component.origins.items() if component is not None else ():
        tensor = origin.tensor(file.tensor)
        if not tensor.is_floating_point():
            return f"{printable(str(file.path))}: its VAE holds whole numbers ({printable(name)}), which are no weights"
        low, high = (tensor.float() if tensor.element_size() < 2 else tensor).aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            return (
                f"{printable(str(file.path))}: its VAE is damaged, {printable(name)} holds NaN or infinite numbers "
                f"(pictures come out blue or black)"
            )
    return ""


def _load_tiny(
    file: ModelFile, names: Mapping[str, str], device: torch.device | str, dtype: torch.dtype
) -> TinyAutoencoder:
    shapes = {name: file.tensors[theirs].shape for name, theirs in names.items()}
    where = printable(str(file.path))
    if any(len(shape) != 4 for name, shape in shapes.items() if name.endswith("weight")):
        raise ModelError(f"{where} is no TAESD that can be used: a weight of it is no filter")
    if any(info.dtype not in FLOATS for info in file.tensors.values()):
        raise ModelError(f"{where} is no TAESD that can be used: it holds whole numbers, which are no weights")
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
        raise ModelError(f"{where} is the encoder of a TAESD; painting takes its decoder")
    with torch.device("meta"):
        vae = TinyAutoencoder(spec)
    assign(vae, {name: file.tensor(theirs) for name, theirs in names.items()}, device=device, dtype=dtype)
    return vae.eval()

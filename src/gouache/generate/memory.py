"""A rough estimate of the memory that a pass needs, to refuse before the first step what this machine cannot do."""

from __future__ import annotations

import torch

from gouache.errors import DeviceError
from gouache.generate.request import Size
from gouache.model.model import Model
from gouache.model.residency import total_memory

# At least so many feature maps of the largest size are alive at once (a residual block's input, norm and output; the
# U-Net's skip connections). A lower bound: only what is impossible is refused.
VAE_MAPS, UNET_MAPS = 3, 8


def check_memory(model: Model, size: Size, batch: int) -> None:
    """Raises DeviceError if a batch of this size needs more memory than the device has."""
    width, height = size
    vae = width * height * _channels(model.vae.spec) * VAE_MAPS * _item(model.vae)
    factor = model.vae.spec.factor
    cells = width // factor * (height // factor)
    unet = 2 * batch * cells * model.unet.spec.channels * UNET_MAPS * _item(model.unet)
    need, have = max(vae, unet), total_memory(model.device)
    if have is not None and need > have:
        how = "a smaller size" if vae >= unet or batch == 1 else "a smaller size or batch"
        count = f" in batches of {batch}" if batch > 1 else ""
        raise DeviceError(
            f"{width}x{height}{count} needs about {need / 1e9:.0f} GB of memory, and {model.device} has "
            f"{have / 1e9:.0f} GB; choose {how}"
        )


def _channels(spec: object) -> int:
    return int(getattr(spec, "channels", 64))


def _item(module: torch.nn.Module) -> int:
    return next(module.parameters()).element_size()

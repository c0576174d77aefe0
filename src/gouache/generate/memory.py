"""A rough estimate of the memory that a pass needs, to refuse before the first step what this machine cannot do."""

from __future__ import annotations

from pathlib import Path

import torch

from gouache.errors import DeviceError
from gouache.generate.request import Size
from gouache.model.model import Model

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


def total_memory(device: torch.device) -> int | None:
    """Bytes of the device's memory; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _channels(spec: object) -> int:
    return int(getattr(spec, "channels", 64))


def _item(module: torch.nn.Module) -> int:
    return next(module.parameters()).element_size()

"""A U-Net with four input channels becomes one for inpainting, with nine: step 0 equals the base."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from gouache.errors import ModelError
from gouache.families.found import Fact
from gouache.model.inpainting import CHANNELS
from gouache.model.model import Model


def widen(model: Model, channels: int = CHANNELS) -> str:
    """Add input channels to the U-Net of `model`, with weights of 0, in place. Returns one line for the user.

    What the new channels contain changes nothing until they are trained. Raises ModelError if the family has no variant
    with so many channels, or the U-Net is not the base variant.
    """
    unet, variants = model.unet, model.family.variants
    if variants.get(channels) is None or variants.get(unet.spec.in_channels) != "base":
        raise ModelError(
            f"a U-Net of {model.family.title} with {unet.spec.in_channels} input channels cannot be given {channels}; "
            "start from the base model"
        )
    first = unet.input_blocks[0].get_submodule("0")
    assert isinstance(first, nn.Conv2d)
    with torch.inference_mode(False), torch.no_grad():
        old = first.weight
        new = torch.zeros(old.shape[0], channels, *old.shape[2:], dtype=old.dtype, device=old.device)
        new[:, : old.shape[1]] = old
        if not old.is_contiguous():
            new = new.contiguous(memory_format=torch.channels_last)
        first.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    first.in_channels = channels
    before, unet.spec = unet.spec.in_channels, replace(unet.spec, in_channels=channels)
    evidence = f"{channels - before} input channels with weights of 0 were added to {before}"
    model.found = replace(model.found, variant=Fact(variants[channels], evidence, "override"))
    return f"the U-Net has {channels} input channels now, for {variants[channels]}; those added start with weights of 0"

"""How the U-Net starts: silent, and hearing every direction of its prompts equally loud.

A small text tower says much along few directions: of its 128, five hold most of the variance, and many nouns differ
along others only. A network that starts with equal ears for all directions first learns to hear the loud ones, which
are the colours, and for a long time nothing else. So the layers that read the prompt start behind a whitening.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gouache.nn.unet import UNet

FLOOR = 1e-3  # directions with less than this share of the mean variance are taken for noise


@torch.no_grad()
def prepare(unet: UNet, said: Tensor) -> UNet:
    """Set the weights of a freshly built U-Net that is to read contexts like `said` (B, N, context_dim)."""
    states = said.flatten(0, 1).double()
    mean = states.mean(0)
    values, axes = torch.linalg.eigh(torch.cov(states.T))
    whiten = axes @ torch.diag((values.clamp_min(0) + FLOOR * values.mean()).rsqrt()) @ axes.T
    for name, parameter in unet.named_parameters():
        # Residual branches and the output start at zero, as in the original U-Net: each block begins as doing nothing.
        if "out_layers.3" in name or "proj_out" in name or name.startswith("out.2"):
            parameter.zero_()
    for name, layer in unet.named_modules():
        if name.endswith("attn2"):
            for reader in (layer.to_k, layer.to_v):
                reader.weight.copy_(reader.weight.double() @ whiten)
            # What every prompt says alike would only drown what each one says.
            layer.to_out[0].bias.sub_(layer.to_out[0].weight @ (layer.to_v.weight @ mean.float()))
    return unet

"""Initial weights of the U-Net, part 1: zero residual branches, and cross-attention behind a whitening of its context.

The states of a small text encoder have most of their variance along few directions: five of 128 hold most of it, and
many nouns differ along others only. Cross-attention initialised for isotropic inputs first learns the directions of
large variance, which are the colours, and for a long time nothing else. So its key and value projections start
multiplied by a whitening matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gouache.nn.unet import UNet

FLOOR = 1e-3  # added to every variance, as a share of the mean variance: directions below it are treated as noise


@torch.no_grad()
def initialise(unet: UNet, context: Tensor) -> UNet:
    """Set the weights of a newly built U-Net that will receive contexts like `context` (B, N, context_dim)."""
    states = context.flatten(0, 1).double()
    mean = states.mean(0)
    values, axes = torch.linalg.eigh(torch.cov(states.T))
    whiten = axes @ torch.diag((values.clamp_min(0) + FLOOR * values.mean()).rsqrt()) @ axes.T
    for name, parameter in unet.named_parameters():
        # Residual branches and the output start at zero, as in the original U-Net: each block starts as the identity.
        if "out_layers.3" in name or "proj_out" in name or name.startswith("out.2"):
            parameter.zero_()
    for name, layer in unet.named_modules():
        if name.endswith("attn2"):
            for projection in (layer.to_k, layer.to_v):
                projection.weight.copy_(projection.weight.double() @ whiten)
            # Subtract the mean context's value: it is the same for all prompts and would mask their differences.
            layer.to_out[0].bias.sub_(layer.to_out[0].weight @ (layer.to_v.weight @ mean.float()))
    return unet

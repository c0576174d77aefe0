"""Random weights for narrow networks: no weight is zero or one, and no two are equal, so that a mix-up is detected."""

from __future__ import annotations

import torch
from torch import nn


def scramble(network: nn.Module, seed: int = 0) -> nn.Module:
    """`network` with random parameters: matrices roughly preserve variance, norm weights are near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (1.5 / parameter[0].numel()) ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return network.eval()


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

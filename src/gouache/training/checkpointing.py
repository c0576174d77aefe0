"""Gradient checkpointing: the blocks of a network keep only their inputs, and are evaluated again for their gradients.

The gradients are bit-equal. Nothing here draws random numbers: what a block draws must not depend on how often it is
evaluated, as is so for the dropouts of `training.targets`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gouache.nn.attention import TransformerBlock
from gouache.nn.blocks import ResBlock
from gouache.nn.clip import Layer

BLOCKS = (ResBlock, TransformerBlock, Layer)


def enable(network: nn.Module) -> Callable[[], None]:
    """Checkpoint each block of a U-Net or text encoder where gradients are enabled; returns the reverse.

    The forward method of each block is replaced, so names and weights stay as they are.
    """
    blocks = [module for module in network.modules() if isinstance(module, BLOCKS) and "forward" not in vars(module)]
    for block in blocks:
        block.forward = _checkpointed(block.forward)

    def disable() -> None:
        for block in blocks:
            vars(block).pop("forward", None)

    return disable


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)

    return run

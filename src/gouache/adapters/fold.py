"""Patches folded into a weight: a new one in the old one's dtype, at little more than a copy's cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gouache.adapters.patch import Patch
from gouache.errors import ModelError

BLOCK = 1 << 20  # elements folded at once on a CPU: what fits into its caches as float32

Fold = Callable[[Tensor], Tensor]
"""The old weight -> the new one, in its dtype, rounded once, in fresh memory."""


def fold(weight: Tensor, patches: Iterable[tuple[Patch, float]]) -> Fold:
    """How patches at their strengths change a weight like `weight`; all that can be done before is done now.

    So the new weights of a whole model follow each other without a pause, which is what it takes to keep all cores
    awake and come near to the time of a copy.
    """
    patches = list(patches)
    pairs = [patch.factors for patch, _ in patches]
    if not all(pair is not None for pair in pairs):
        return lambda old: _one_by_one(old, patches)
    up = torch.cat([pair[0] * strength for pair, (_, strength) in zip(pairs, patches) if pair is not None], 1)
    down = torch.cat([pair[1].flatten(1) for pair in pairs if pair is not None])
    if weight.numel() != up.shape[0] * down.shape[1] or weight.shape[0] != up.shape[0]:
        raise ModelError(f"it makes {[up.shape[0], down.shape[1]]}, the weight is {list(weight.shape)}")
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # A CPU that multiplies bfloat16 itself is handed each factor as a sum of two: 2^-16 of the change is lost.
        (up, up_rest), (down, down_rest) = _halves(up), _halves(down)
        up, down = torch.cat([up, up_rest, up], 1), torch.cat([down, down, down_rest])
    if up.dtype == weight.dtype:
        return lambda old: torch.addmm(old.flatten(1), up, down).reshape(old.shape)
    return lambda old: _in_blocks(old, up, down)


def _one_by_one(weight: Tensor, patches: Iterable[tuple[Patch, float]]) -> Tensor:
    made = weight.float()
    for patch, strength in patches:
        made = patch.weight(made, strength)
    return made.to(weight.dtype) if made.dtype != weight.dtype else made.clone() if made is weight else made


def _in_blocks(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """weight + up down, in float32: on a CPU by blocks of rows, each widened, changed and written in the cache."""
    rows = weight.flatten(1)
    made = torch.empty_like(rows)
    step = max(1, BLOCK // rows.shape[1]) if weight.device.type == "cpu" else len(rows)
    scratch = torch.empty(min(step, len(rows)), rows.shape[1], device=rows.device)
    for first in range(0, len(rows), step):
        block = slice(first, first + step)
        wide = scratch[: len(rows[block])]
        made[block].copy_(wide.copy_(rows[block]).addmm_(up[block], down))
    return made.reshape(weight.shape)


def _halves(factor: Tensor) -> tuple[Tensor, Tensor]:
    """(bfloat16, what that leaves over as bfloat16)"""
    whole = factor.bfloat16()
    return whole, (factor - whole.float()).bfloat16()


def folded_bias(bias: Tensor, patches: Iterable[tuple[Patch, float]]) -> Tensor:
    """The new bias, in fresh memory."""
    made = bias
    for patch, strength in patches:
        made = patch.bias(made, strength)
    return made.to(bias.dtype)

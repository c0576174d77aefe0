"""Patches folded into a weight: a new one in the old one's dtype, at little more than a copy's cost."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gouache.adapters.patch import Patch
from gouache.errors import ModelError

BLOCK = 1 << 20  # elements folded at once on a CPU: what fits into its caches as float32


def folded(weight: Tensor, patches: Iterable[tuple[Patch, float]]) -> Tensor:
    """`weight` with patches at their strengths, in its own dtype, rounded once, in fresh memory."""
    patches = list(patches)
    pairs = [patch.factors for patch, _ in patches]
    if all(pair is not None for pair in pairs):
        ups = [pair[0] * strength for pair, (_, strength) in zip(pairs, patches) if pair is not None]
        downs = [pair[1].flatten(1) for pair in pairs if pair is not None]
        return _added(weight, torch.cat(ups, 1), torch.cat(downs))
    made = weight.float()
    for patch, strength in patches:
        made = patch.weight(made, strength)
    return made.to(weight.dtype)


def _added(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """weight + up down, in float32 and rounded once; on a CPU at little more than a copy's cost.

    There, by blocks of rows: each is read, widened and written once, and stays in the cache between. Where the CPU
    multiplies bfloat16 itself, it is handed each factor as a sum of two, which leaves an error of 2^-16 of the change.
    """
    if weight.numel() != up.shape[0] * down.shape[1] or weight.shape[0] != up.shape[0]:
        raise ModelError(f"it makes {[up.shape[0], down.shape[1]]}, the weight is {list(weight.shape)}")
    rows = weight.flatten(1)
    made = torch.empty_like(rows)
    if made.dtype == torch.bfloat16 and made.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        (up, up_rest), (down, down_rest) = _halves(up), _halves(down)
        made.copy_(rows).addmm_(torch.cat([up, up_rest, up], 1), torch.cat([down, down, down_rest]))
        return made.reshape(weight.shape)
    step = max(1, BLOCK // rows.shape[1]) if weight.device.type == "cpu" else len(rows)
    scratch = torch.empty(min(step, len(rows)), rows.shape[1], device=rows.device)
    for first in range(0, len(rows), step):
        block = slice(first, first + step)
        narrow = made.dtype != torch.float32
        wide = scratch[: len(rows[block])] if narrow else made[block]
        wide.copy_(rows[block]).addmm_(up[block], down)
        if narrow:
            made[block].copy_(wide)
    return made.reshape(weight.shape)


def _halves(factor: Tensor) -> tuple[Tensor, Tensor]:
    """(bfloat16, what that leaves over as bfloat16)"""
    whole = factor.bfloat16()
    return whole, (factor - whole.float()).bfloat16()


def folded_bias(bias: Tensor, patches: Iterable[tuple[Patch, float]]) -> Tensor:
    made = bias
    for patch, strength in patches:
        made = patch.bias(made, strength)
    return made.to(bias.dtype)

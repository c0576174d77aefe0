"""Folding patches into a weight: a new tensor in the weight's dtype, for little more than the cost of a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gouache.adapters.patch import Patch
from gouache.errors import ModelError

BLOCK = 1 << 20  # elements folded at once on a CPU: as float32 they fit into its caches

Fold = Callable[[Tensor], Tensor]
"""The old weight -> the new weight in the same dtype, rounded once, in new memory."""


def fold(weight: Tensor, patches: Iterable[tuple[Patch, float]]) -> Fold:
    """The function that applies patches at their strengths to a weight shaped like `weight`. Raises ModelError.

    Everything that can be precomputed is computed here, so that the new weights of a model can be computed one after
    another without a pause. That keeps all cores busy, and the total time close to that of a copy.
    """
    patches = list(patches)
    pairs = [patch.factors for patch, _ in patches]
    if not all(pair is not None for pair in pairs):
        return lambda old: _apply_in_turn(old, patches)
    up = torch.cat([pair[0] * strength for pair, (_, strength) in zip(pairs, patches) if pair is not None], 1)
    down = torch.cat([pair[1].flatten(1) for pair in pairs if pair is not None])
    if weight.numel() != up.shape[0] * down.shape[1] or weight.shape[0] != up.shape[0]:
        raise ModelError(f"its delta is {[up.shape[0], down.shape[1]]}, the weight is {list(weight.shape)}")
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # For a CPU with bfloat16 products each factor is split into a sum of two: the relative error is 2^-16.
        (up, up_rest), (down, down_rest) = _split_bf16(up), _split_bf16(down)
        up, down = torch.cat([up, up_rest, up], 1), torch.cat([down, down, down_rest])
    if up.dtype == weight.dtype:
        return lambda old: torch.addmm(old.flatten(1), up, down).reshape(old.shape)
    return lambda old: _in_blocks(old, up, down)


def _apply_in_turn(weight: Tensor, patches: Iterable[tuple[Patch, float]]) -> Tensor:
    new = weight.float()
    for patch, strength in patches:
        new = patch.weight(new, strength)
    return new.to(weight.dtype) if new.dtype != weight.dtype else new.clone() if new is weight else new


def _in_blocks(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """weight + up down, in float32: on a CPU by blocks of rows, each converted, changed and stored within the cache."""
    rows = weight.flatten(1)
    new = torch.empty_like(rows)
    step = max(1, BLOCK // rows.shape[1]) if weight.device.type == "cpu" else len(rows)
    scratch = torch.empty(min(step, len(rows)), rows.shape[1], device=rows.device)
    for first in range(0, len(rows), step):
        block = slice(first, first + step)
        converted = scratch[: len(rows[block])]
        new[block].copy_(converted.copy_(rows[block]).addmm_(up[block], down))
    return new.reshape(weight.shape)


def _split_bf16(factor: Tensor) -> tuple[Tensor, Tensor]:
    """(factor as bfloat16, remainder as bfloat16)"""
    rounded = factor.bfloat16()
    return rounded, (factor - rounded.float()).bfloat16()


def folded_bias(bias: Tensor, patches: Iterable[tuple[Patch, float]]) -> Tensor:
    """The new bias in the dtype of `bias`, in new memory."""
    new = bias
    for patch, strength in patches:
        new = patch.bias(new, strength)
    return new.to(bias.dtype)

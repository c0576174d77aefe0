"""The forms of adapters: the change of a weight that each computes.

Notation: W is (out, in) for a linear layer, (out, in, k, k) for a convolution; r is a rank; scale = alpha / r, where an
alpha that is absent or zero counts as r. The delta of an additive form does not depend on W; that of a multiplicative
form does.
Sources: Hu et al. 2021 (LoRA), Yeh et al. 2023 (LyCORIS: LoCon, LoHa, LoKr), Chavan et al. 2023 (GLoRA), Liu et al.
2022 (IA3), Qiu et al. 2023 (OFT), Liu et al. 2023 (BOFT), Liu et al. 2024 (DoRA); and the files that kohya's, LyCORIS'
and PEFT's trainers write.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gouache.errors import ModelError

Parts = Mapping[str, Tensor]
"""The tensors of one module by their suffix in kohya's and LyCORIS' files; float32."""


def scale(parts: Parts, rank: int) -> float:
    """The factor that multiplies the product of the low-rank factors."""
    factor = float(parts["scalar"]) if "scalar" in parts else 1.0
    if "scale" in parts:
        return factor * float(parts["scale"])
    alpha = float(parts["alpha"]) if "alpha" in parts else 0.0
    return factor * alpha / rank if alpha and rank else factor


def scaled(x: Tensor, factor: float) -> Tensor:
    """x * factor; x itself for a factor of 1, which is usual and of which a training step has hundreds."""
    return x if factor == 1 else x * factor


def lora(parts: Parts) -> Tensor:
    """up @ down; with a core (LoCon's Tucker form), the core contracted with up on the left and down on the right."""
    up, down = parts["lora_up.weight"], parts["lora_down.weight"]
    if "lora_mid.weight" in parts:
        delta = _tucker(parts["lora_mid.weight"], up.flatten(1), down.flatten(1))
    else:
        delta = (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    return scale(parts, down.shape[0]) * delta


def loha(parts: Parts) -> Tensor:
    """(w1_a w1_b) * (w2_a w2_b), elementwise; with cores, each factor is a Tucker product."""
    factors = []
    for number in ("1", "2"):
        a, b = parts[f"hada_w{number}_a"], parts[f"hada_w{number}_b"]
        core = parts.get(f"hada_t{number}")
        # With a core, a is (r, out), the transpose of the form without one.
        factors.append(a @ b if core is None else _tucker(core, a.T, b))
    return scale(parts, parts["hada_w1_b"].shape[0]) * factors[0] * factors[1]


def lokr(parts: Parts) -> Tensor:
    """The Kronecker product w1 (x) w2, each full or a product; if both are full, alpha has no effect."""
    rank: int | None = None
    if "lokr_w1" in parts:
        left = parts["lokr_w1"]
    else:
        rank = parts["lokr_w1_b"].shape[0]
        left = parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        right = parts["lokr_w2"]
    else:
        a, b = parts["lokr_w2_a"], parts["lokr_w2_b"]
        rank = b.shape[0]
        core = parts.get("lokr_t2")
        right = a @ b.flatten(1) if core is None else _tucker(core, a.T, b)
        right = right.reshape(a.shape[0], *b.shape[1:]) if core is None else right
    if right.ndim == 4:
        left = left[..., None, None]
    used = {name: part for name, part in parts.items() if name in ("scale", "scalar", "alpha" if rank else "scalar")}
    return scale(used, rank or 1) * torch.kron(left.contiguous(), right.contiguous())


def full(parts: Parts) -> Tensor:
    """The stored delta."""
    return parts["diff"]


def sparse(parts: Parts, shape: torch.Size) -> Tensor:
    """The sparse residual that early LyCORIS extractions store in addition to the factors: values and their indices.

    Raises IndexError for indices outside `shape`, and RuntimeError if the file has another shape.
    """
    size, indices = parts["bias_size"].long().tolist(), parts["bias_indices"].long()
    if math.prod(size) != math.prod(shape) or min(size) < 1 or (indices < 0).any():
        raise IndexError(f"the indices are for {size}, the weight is {list(shape)}")
    delta = torch.zeros(size, dtype=parts["bias_values"].dtype, device=indices.device)
    delta.index_put_(tuple(indices), parts["bias_values"], accumulate=True)
    return delta.reshape(shape)


def dora(weight: Tensor, delta: Tensor, magnitude: Tensor, by_row: bool) -> Tensor:
    """m (W + delta) / |W + delta| - W, with one norm per row or per column.

    The quotient is computed first: it is exactly 1, and the change exactly 0, before m and delta are trained.
    """
    updated = weight + delta
    norms = dora_magnitude(updated, by_row)
    quotient = magnitude.reshape(norms.shape) / norms.clamp_min(torch.finfo(weight.dtype).eps)
    return quotient * updated - weight


def dora_magnitude(weight: Tensor, by_row: bool = True) -> Tensor:
    """The norms of the rows of W, (out, 1) or (out, 1, 1, 1), or of its columns, (1, in) or (1, in, 1, 1)."""
    if by_row:
        return weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    return weight.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))


def _tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sum over i, j of left[o, i] core[i, j, ...] right[j, n]: (out, in, k, k)."""
    return torch.einsum("ij...,oi,jn->on...", core, left, right)


def glora(parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """strength (W a1 a2 + b1 b2); a convolution may have a core between b1 and b2.

    Early LyCORIS versions stored the factors of each pair in reverse order, b2 b1 and a2 a1; the shapes show which.
    """
    a1, a2, b1, b2 = (parts[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    if not a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0]:
        a1, a2, b1, b2 = a2, a1, b2, b1
    inner = a1.flatten(1) @ a2.flatten(1)  # in x in
    multiplicative = torch.einsum("oi...,ij->oj...", weight, inner)
    if "bm.weight" in parts:
        additive = _tucker(parts["bm.weight"], b1.flatten(1), b2.flatten(1))
    else:
        additive = (b1.flatten(1) @ b2.flatten(1)).reshape(weight.shape)
    return strength * scale(parts, a2.shape[0]) * (multiplicative + additive)


def ia3(parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """W (1 + strength w), where w has one value per input or per output; returns the delta."""
    on_input = bool(parts["on_input"]) if "on_input" in parts else False
    return strength * weight * _broadcast(parts["weight"], weight, on_input)


def peft_ia3(parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """W l; the shape of l gives the side: (out, 1) or (1, in), and (1, n, 1, 1) for a convolution; returns the delta.

    For a convolution with as many inputs as outputs the side is the outputs, PEFT's default.
    """
    factor = parts["ia3_l"]
    if factor.ndim == 2:
        on_input = factor.shape[0] == 1 and factor.shape[1] == weight.shape[1]
    else:
        on_input = factor.numel() == weight.shape[1] != weight.shape[0]
    return strength * weight * (_broadcast(factor, weight, on_input) - 1)


def _broadcast(factor: Tensor, weight: Tensor, on_input: bool) -> Tensor:
    side = int(on_input)
    if weight.ndim <= side or factor.numel() != weight.shape[side]:
        raise ModelError(f"its factors are {list(factor.shape)}, the weight is {list(weight.shape)}")
    shape = [1] * weight.ndim
    shape[side] = -1
    return factor.reshape(shape)


def oft(parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """R^T W in blocks of rows; R is the Cayley transform of a skew matrix, or, in older files, stored directly.

    The strength interpolates R from the identity. `rescale` then multiplies each row.
    """
    if "oft_diag" in parts:
        rotation = parts["oft_diag"]
    else:
        rotation = _cayley(parts["oft_blocks"], _max_norm(parts, weight))
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    partial_rotation = eye + strength * (rotation - eye)
    rotated = torch.einsum("knm,kn...->km...", partial_rotation, _in_blocks(weight, rotation.shape[-1]))
    return _rescaled(rotated.reshape(weight.shape), parts, strength) - weight


def boft(parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """W after a butterfly's stages; stage i mixes rows 2^i blocks apart. The strength applies per stage (LyCORIS)."""
    rotation = _cayley(parts["oft_blocks"], _max_norm(parts, weight))
    stages, _, width, _ = rotation.shape
    eye = torch.eye(width, dtype=rotation.dtype, device=rotation.device)
    rows = weight
    for stage in range(stages):
        distance = 2**stage * (width // 2)
        rows = rows.unflatten(0, (-1, 2, distance)).transpose(1, 2).flatten(0, 2)
        partial_rotation = eye + strength * (rotation[stage] - eye)
        rows = torch.einsum("bij,bj...->bi...", partial_rotation, _in_blocks(rows, width)).flatten(0, 1)
        rows = rows.unflatten(0, (-1, distance, 2)).transpose(1, 2).flatten(0, 2)
    return _rescaled(rows, parts, strength) - weight


def _rescaled(weight: Tensor, parts: Parts, strength: float) -> Tensor:
    if "rescale" not in parts:
        return weight
    return weight * (1 + strength * (_broadcast(parts["rescale"], weight, False) - 1))


def _in_blocks(weight: Tensor, width: int) -> Tensor:
    """(out, ...) -> (out / width, width, ...)."""
    return weight.unflatten(0, (-1, width))


def _max_norm(parts: Parts, weight: Tensor) -> float:
    """The maximal norm of the skew matrix, which these forms store under the name alpha; 0 for no limit."""
    return float(parts["alpha"]) * weight.shape[0] if "alpha" in parts else 0.0


def _cayley(blocks: Tensor, limit: float) -> Tensor:
    """(I + Q) (I - Q)^-1 with Q = blocks - blocks^T, scaled to a norm of at most `limit`."""
    skew = blocks - blocks.transpose(-1, -2)
    if limit > 0:
        norm = skew.norm() + 1e-8
        skew = skew * (limit / norm).clamp(max=1)
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye - skew, eye + skew, left=False)


def peft_oft(parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """W R^T in blocks of inputs; the file stores the upper triangle of each block's skew matrix, row by row.

    With "cayley_terms", from PEFT's config, R is computed from the first terms of the Cayley transform's series.
    """
    packed = parts["oft_R.weight"]
    width = round((1 + (1 + 8 * packed.shape[1]) ** 0.5) / 2)
    skew = packed.new_zeros(packed.shape[0], width, width)
    rows, columns = torch.triu_indices(width, width, 1, device=packed.device)
    skew[:, rows, columns] = packed
    skew = skew - skew.transpose(-1, -2)
    eye = torch.eye(width, dtype=skew.dtype, device=skew.device)
    terms = int(parts["cayley_terms"]) if "cayley_terms" in parts else 0
    if terms:
        rotation, power = eye.expand_as(skew), skew
        last = max(3, terms - 1) if terms > 2 else terms - 1
        for exponent in range(1, last + 1):
            rotation = rotation + (1 if exponent == last > 1 else 2) * power
            power = power @ skew
    else:
        rotation = torch.linalg.solve(eye + skew, eye - skew, left=False)
    inputs = weight.flatten(1).unflatten(1, (-1, width))  # out blocks width
    rotation = rotation.expand(inputs.shape[1], -1, -1)  # a single one is shared by all blocks
    return strength * (torch.einsum("obj,bij->obi", inputs, rotation).reshape(weight.shape) - weight)


def peft_boft(parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """s W B, where B is the product of a butterfly's stages over the inputs (PEFT; for a convolution in * k * k)."""
    data = parts["boft_R"]
    if data.ndim != 4 or not data.numel():
        raise ModelError(f"its boft_R is {list(data.shape)}, expected (stages, blocks, width, width)")
    stages, blocks, width, _ = data.shape
    skew = (data - data.transpose(-1, -2)) / 2
    eye = torch.eye(width, dtype=skew.dtype, device=skew.device)
    rotation = torch.linalg.solve(eye + skew, eye - skew, left=False)
    size = blocks * width
    product = torch.eye(size, dtype=skew.dtype, device=skew.device)
    for stage in range(stages):
        order = _butterfly(size, blocks // 2**stage, width // 2) if stages > 1 else torch.arange(size)
        product = torch.block_diag(*rotation[stage])[order][:, order] @ product
    changed = (weight.flatten(1) @ product.T).reshape(weight.shape)
    if "boft_s" in parts:
        changed = changed * _broadcast(parts["boft_s"], weight, False)
    return strength * (changed - weight)


def _butterfly(size: int, segments: int, width: int) -> Tensor:
    """The permutation that puts, in each segment, the even pieces of `width` before the odd ones."""
    pieces = torch.arange(size // segments).unflatten(0, (-1, width))
    order = torch.cat([pieces[0::2], pieces[1::2]]).flatten()
    return (torch.arange(segments)[:, None] * (size // segments) + order).flatten()

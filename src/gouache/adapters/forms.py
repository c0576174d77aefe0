"""The forms of adapters: what each makes of a weight.

Notation: W is (out, in) for a linear layer, (out, in, k, k) for a convolution; r a rank; scale = alpha / r, with r for
an alpha that is absent or zero. An additive form makes a delta whatever W is; a multiplicative one changes W itself.
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
"""The tensors of one module by their suffix, in the words of kohya's and LyCORIS' files; float32."""


def scale(parts: Parts, rank: int) -> float:
    """What the product of the factors is multiplied by."""
    factor = float(parts["scalar"]) if "scalar" in parts else 1.0
    if "scale" in parts:
        return factor * float(parts["scale"])
    alpha = float(parts["alpha"]) if "alpha" in parts else 0.0
    return factor * alpha / rank if alpha and rank else factor


def lora(parts: Parts) -> Tensor:
    """up @ down; with a core, the convolution is core contracted with up on the left and down on the right."""
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
        # With a core, a is (r, out): transposed against the form without one.
        factors.append(a @ b if core is None else _tucker(core, a.T, b))
    return scale(parts, parts["hada_w1_b"].shape[0]) * factors[0] * factors[1]


def lokr(parts: Parts) -> Tensor:
    """w1 (x) w2, either whole or a product; where both are whole, there is no rank and alpha means nothing."""
    rank: int | None = None
    if "lokr_w1" in parts:
        first = parts["lokr_w1"]
    else:
        rank = parts["lokr_w1_b"].shape[0]
        first = parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        second = parts["lokr_w2"]
    else:
        a, b = parts["lokr_w2_a"], parts["lokr_w2_b"]
        rank = b.shape[0]
        core = parts.get("lokr_t2")
        second = a @ b.flatten(1) if core is None else _tucker(core, a.T, b)
        second = second.reshape(a.shape[0], *b.shape[1:]) if core is None else second
    if second.ndim == 4:
        first = first[..., None, None]
    told = {name: part for name, part in parts.items() if name in ("scale", "scalar", "alpha" if rank else "scalar")}
    return scale(told, rank or 1) * torch.kron(first.contiguous(), second.contiguous())


def full(parts: Parts) -> Tensor:
    """The delta as it is."""
    return parts["diff"]


def sparse(parts: Parts, shape: torch.Size) -> Tensor:
    """What LyCORIS' first extractions left over beside the factors: a few values of the delta, by their places.

    Raises IndexError for places outside of `shape`, and RuntimeError where the file means another shape.
    """
    size, places = parts["bias_size"].long().tolist(), parts["bias_indices"].long()
    if math.prod(size) != math.prod(shape) or min(size) < 1 or (places < 0).any():
        raise IndexError(f"the places are in {size}, the weight is {list(shape)}")
    delta = torch.zeros(size, dtype=parts["bias_values"].dtype, device=places.device)
    delta.index_put_(tuple(places), parts["bias_values"], accumulate=True)
    return delta.reshape(shape)


def _tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sum over i, j of left[o, i] core[i, j, ...] right[j, n]: (out, in, k, k)."""
    return torch.einsum("ij...,oi,jn->on...", core, left, right)


def glora(parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """strength (W a1 a2 + b1 b2), with a core between the two b's for a convolution that has one.

    LyCORIS' first versions had the factors of each pair the other way round, b2 b1 and a2 a1, which their shapes tell.
    """
    a1, a2, b1, b2 = (parts[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    if not a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0]:
        a1, a2, b1, b2 = a2, a1, b2, b1
    inner = a1.flatten(1) @ a2.flatten(1)  # in x in
    through = torch.einsum("oi...,ij->oj...", weight, inner)
    if "bm.weight" in parts:
        beside = _tucker(parts["bm.weight"], b1.flatten(1), b2.flatten(1))
    else:
        beside = (b1.flatten(1) @ b2.flatten(1)).reshape(weight.shape)
    return strength * scale(parts, a2.shape[0]) * (through + beside)


def ia3(parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """W times (1 + strength w), w a number for each input or each output."""
    on_input = bool(parts["on_input"]) if "on_input" in parts else False
    return strength * weight * _across(parts["weight"], weight, on_input)


def peft_ia3(parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """W times l, of which PEFT's files tell the side by shape: (out, 1) or (1, in); (1, n, 1, 1) of a convolution.

    Where a convolution has as many inputs as outputs, it is the outputs, as it is unless PEFT is told otherwise.
    """
    factor = parts["ia3_l"]
    if factor.ndim == 2:
        on_input = factor.shape[0] == 1 and factor.shape[1] == weight.shape[1]
    else:
        on_input = factor.numel() == weight.shape[1] != weight.shape[0]
    return strength * weight * (_across(factor, weight, on_input) - 1)


def _across(factor: Tensor, weight: Tensor, on_input: bool) -> Tensor:
    side = int(on_input)
    if weight.ndim <= side or factor.numel() != weight.shape[side]:
        raise ModelError(f"it has {factor.numel()} factors, the weight is {list(weight.shape)}")
    shape = [1] * weight.ndim
    shape[side] = -1
    return factor.reshape(shape)


def oft(parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """R^T W in blocks of rows; R is the Cayley transform of a skew matrix, or, in older files, given itself.

    The strength turns R towards the identity. A `rescale` then multiplies each row.
    """
    if "oft_diag" in parts:
        rotation = parts["oft_diag"]
    else:
        rotation = _cayley(parts["oft_blocks"], _limit(parts, weight))
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    turned = torch.einsum("knm,kn...->km...", eye + strength * (rotation - eye), _in_blocks(weight, rotation.shape[-1]))
    return _rescaled(turned.reshape(weight.shape), parts, strength) - weight


def boft(parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """W through stages of a butterfly, stage i mixing rows 2^i blocks apart; the strength acts in each (LyCORIS)."""
    rotation = _cayley(parts["oft_blocks"], _limit(parts, weight))
    stages, _, width, _ = rotation.shape
    eye = torch.eye(width, dtype=rotation.dtype, device=rotation.device)
    rows = weight
    for stage in range(stages):
        apart = 2**stage * (width // 2)
        rows = rows.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2)
        turn = eye + strength * (rotation[stage] - eye)
        rows = torch.einsum("bij,bj...->bi...", turn, _in_blocks(rows, width)).flatten(0, 1)
        rows = rows.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    return _rescaled(rows, parts, strength) - weight


def _rescaled(weight: Tensor, parts: Parts, strength: float) -> Tensor:
    if "rescale" not in parts:
        return weight
    return weight * (1 + strength * (_across(parts["rescale"], weight, False) - 1))


def _in_blocks(weight: Tensor, width: int) -> Tensor:
    """(out, ...) -> (out / width, width, ...)."""
    return weight.unflatten(0, (-1, width))


def _limit(parts: Parts, weight: Tensor) -> float:
    """How far from the identity R may be: these forms keep that under the name alpha; 0 for any distance."""
    return float(parts["alpha"]) * weight.shape[0] if "alpha" in parts else 0.0


def _cayley(blocks: Tensor, limit: float) -> Tensor:
    """(I + Q) (I - Q)^-1 with Q = blocks - blocks^T, of a norm of at most `limit`."""
    skew = blocks - blocks.transpose(-1, -2)
    if limit > 0:
        length = skew.norm() + 1e-8
        skew = skew * (limit / length).clamp(max=1)
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye - skew, eye + skew, left=False)


def peft_oft(parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """W R^T in blocks of inputs; the file holds the upper triangle of each block's skew matrix, row by row.

    PEFT's trainer uses the first terms of the Cayley transform's series where its config says so ("cayley_terms").
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
    rotation = rotation.expand(inputs.shape[1], -1, -1)  # one for all blocks, if there is but one
    return strength * (torch.einsum("obj,bij->obi", inputs, rotation).reshape(weight.shape) - weight)


def peft_boft(parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """s W B, B the product of a butterfly's stages over the inputs (PEFT; of a convolution, inputs times pixels)."""
    data = parts["boft_R"]
    if data.ndim != 4 or not data.numel():
        raise ModelError(f"its boft_R is {list(data.shape)}, expected stages, blocks and two widths")
    stages, blocks, width, _ = data.shape
    skew = (data - data.transpose(-1, -2)) / 2
    eye = torch.eye(width, dtype=skew.dtype, device=skew.device)
    rotation = torch.linalg.solve(eye + skew, eye - skew, left=False)
    size = blocks * width
    whole = torch.eye(size, dtype=skew.dtype, device=skew.device)
    for stage in range(stages):
        order = _butterfly(size, blocks // 2**stage, width // 2) if stages > 1 else torch.arange(size)
        whole = torch.block_diag(*rotation[stage])[order][:, order] @ whole
    changed = (weight.flatten(1) @ whole.T).reshape(weight.shape)
    if "boft_s" in parts:
        changed = changed * _across(parts["boft_s"], weight, False)
    return strength * (changed - weight)


def _butterfly(size: int, segments: int, width: int) -> Tensor:
    """The order in which, in each segment, the even pieces of `width` come before the odd ones."""
    pieces = torch.arange(size // segments).unflatten(0, (-1, width))
    order = torch.cat([pieces[0::2], pieces[1::2]]).flatten()
    return (torch.arange(segments)[:, None] * (size // segments) + order).flatten()

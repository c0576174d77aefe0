"""What an adapter does to one module, in every format: a new weight (and bias) out of the old one.

Notation: W is (out, in) for a linear layer, (out, in, k, k) for a convolution; r a rank; scale = alpha / r, with r for
an alpha that is absent or zero. Sources: Hu et al. 2021 (LoRA), LyCORIS (Yeh et al. 2023) for LoCon, LoHa and LoKr,
Liu et al. 2024 (DoRA), and the files that kohya's and LyCORIS' trainers write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gouache.errors import ModelError

Parts = Mapping[str, Tensor]
"""The tensors of one module by their suffix, in the words of kohya's and LyCORIS' files."""

# Other dialects' suffixes -> those words.
SAME: Mapping[str, str] = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "w_norm": "diff",
    "b_norm": "diff_b",
}


@dataclass(frozen=True)
class Patch:
    """One module's part of an adapter. `parts` are in float32."""

    parts: Parts

    def weight(self, weight: Tensor, strength: float) -> Tensor:
        """The new weight, float32, for the old one. Raises ModelError where their shapes do not fit."""
        old, delta = weight.float(), self.delta()
        if delta is None:
            return old
        if delta.numel() != old.numel() or delta.shape[0] != old.shape[0]:
            raise ModelError(f"it makes {list(delta.shape)}, the weight is {list(old.shape)}")
        delta = delta.reshape(old.shape)  # a 1x1 convolution and a linear layer are the same matrix
        if "dora_scale" not in self.parts:
            return old + strength * delta
        return _dora(old, delta, self.parts["dora_scale"], strength)

    def bias(self, bias: Tensor, strength: float) -> Tensor:
        """The new bias, float32. Raises ModelError where its shape does not fit."""
        if "diff_b" not in self.parts:
            return bias.float()
        if self.parts["diff_b"].shape != bias.shape:
            raise ModelError(f"it makes a bias of {list(self.parts['diff_b'].shape)}, there it is {list(bias.shape)}")
        return bias.float() + strength * self.parts["diff_b"]

    def delta(self) -> Tensor | None:
        """What is added to the weight at strength 1; None where only the bias changes."""
        for form, (needs, make) in _FORMS.items():
            if any(name in self.parts for name in needs):
                try:
                    return make(self.parts)
                except KeyError as missing:
                    raise ModelError(f"it is a {form} without its part {missing.args[0]}") from None
        if "diff_b" not in self.parts:
            raise ModelError(f"none of its parts ({', '.join(self.parts)}) is of a form that is known")
        return None

    @property
    def rank(self) -> int | None:
        """Of a LoRA; None for other forms."""
        return self.parts["lora_down.weight"].shape[0] if "lora_down.weight" in self.parts else None


def _scale(parts: Parts, rank: int) -> float:
    alpha = float(parts["alpha"]) if "alpha" in parts else 0.0
    return alpha / rank if alpha else 1.0


def _lora(parts: Parts) -> Tensor:
    """up @ down; with a core, the convolution is core contracted with up on the left and down on the right."""
    up, down = parts["lora_up.weight"], parts["lora_down.weight"]
    scale = _scale(parts, down.shape[0])
    if "lora_mid.weight" in parts:
        return scale * _tucker(parts["lora_mid.weight"], up.flatten(1), down.flatten(1))
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sum over i, j of left[o, i] core[i, j, ...] right[j, n]: (out, in, k, k)."""
    return torch.einsum("ij...,oi,jn->on...", core, left, right)


def _loha(parts: Parts) -> Tensor:
    """(w1_a w1_b) * (w2_a w2_b), elementwise; with cores, each factor is a Tucker product."""
    scale = _scale(parts, parts["hada_w1_b"].shape[0])
    factors = []
    for number in ("1", "2"):
        a, b = parts[f"hada_w{number}_a"], parts[f"hada_w{number}_b"]
        core = parts.get(f"hada_t{number}")
        # With a core, a is (r, out): transposed against the form without one.
        factors.append(a @ b if core is None else _tucker(core, a.T, b))
    return scale * factors[0] * factors[1]


def _lokr(parts: Parts) -> Tensor:
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
    return (_scale(parts, rank) if rank is not None else 1.0) * torch.kron(first.contiguous(), second.contiguous())


def _full(parts: Parts) -> Tensor:
    return parts["diff"]


def _dora(weight: Tensor, delta: Tensor, magnitude: Tensor, strength: float) -> Tensor:
    """W + strength (m (W + delta) / |W + delta| - W), the length taken of each column, or row, that has a magnitude.

    Which of the two is told by the magnitude's own shape: (1, in, 1, 1), or (out,) and (out, 1, 1, 1).
    """
    moved = weight + delta
    rows = moved.flatten(1)
    by_row = magnitude.numel() == weight.shape[0] and not (magnitude.ndim > 1 and magnitude.shape[0] == 1)
    if by_row:
        length = rows.norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    else:
        length = moved.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
    directed = magnitude.reshape(length.shape) * moved / length.clamp_min(torch.finfo(weight.dtype).eps)
    return weight + strength * (directed - weight)


# Form -> (parts any of which tells it, how its delta is made).
_FORMS: Mapping[str, tuple[tuple[str, ...], Callable[[Parts], Tensor]]] = {
    "LoRA": (("lora_up.weight", "lora_down.weight"), _lora),
    "LoHa": (("hada_w1_a", "hada_w1_b"), _loha),
    "LoKr": (("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"), _lokr),
    "full difference": (("diff",), _full),
}

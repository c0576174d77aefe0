"""What an adapter does to one module: a new weight (and bias) out of the old one, in whatever form its file has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gouache.adapters import forms
from gouache.adapters.forms import Parts
from gouache.errors import ModelError

# Other dialects' suffixes -> the words of kohya's and LyCORIS' files.
SAME: Mapping[str, str] = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_rows",  # PEFT's, always of the rows
    "lora_magnitude_vector.weight": "dora_rows",
    "w_norm": "diff",
    "b_norm": "diff_b",
}


@dataclass(frozen=True)
class Patch:
    """One module's part of an adapter. `parts` are in float32.

    `share` (i, n): the file changes n modules as one, whose rows stand below each other (OpenCLIP's fused query, key
    and value); this module is the i-th of them.
    """

    parts: Parts
    share: tuple[int, int] = (0, 1)

    def weight(self, weight: Tensor, strength: float) -> Tensor:
        """The new weight, float32, for the old one. Raises ModelError where their shapes do not fit."""
        old = weight.float()
        change = self.change(old, strength)
        return old if change is None else old + change

    def bias(self, bias: Tensor, strength: float) -> Tensor:
        """The new bias, float32. Raises ModelError where its shape does not fit."""
        delta = self.bias_delta(bias)
        return bias.float() if delta is None else bias.float() + strength * delta

    def bias_delta(self, bias: Tensor) -> Tensor | None:
        """What is added to the bias at strength 1; None where it stays."""
        if "diff_b" not in self.parts:
            return None
        index, count = self.share
        delta = self.parts["diff_b"].chunk(count)[index]
        if delta.shape != bias.shape:
            raise ModelError(f"it makes a bias of {list(delta.shape)}, there it is {list(bias.shape)}")
        return delta

    def change(self, weight: Tensor, strength: float) -> Tensor | None:
        """What is added to `weight`, float32 and of its shape; None where only the bias changes."""
        if (form := self.form) is None:
            return None
        if form in _MULTIPLICATIVE:
            if self.share != (0, 1):
                raise ModelError(f"it is a {form} of several modules in one, which cannot be told apart")
            return _whole(form, lambda: _MULTIPLICATIVE[form][1](self.parts, weight, strength))
        delta = self._sparse(weight.shape) if form == _SPARSE else self.delta()
        assert delta is not None
        if delta.numel() != weight.numel() or delta.shape[0] != weight.shape[0]:
            raise ModelError(f"it makes {list(delta.shape)}, the weight is {list(weight.shape)}")
        delta = delta.reshape(weight.shape)  # a 1x1 convolution and a linear layer are the same matrix
        if form != _SPARSE and "bias_values" in self.parts:
            delta = delta + self._sparse(weight.shape)
        if "dora_rows" in self.parts:
            return strength * _dora(weight, delta, self.parts["dora_rows"].flatten())
        if "dora_scale" in self.parts:
            return strength * _dora(weight, delta, self.parts["dora_scale"])
        return strength * delta

    def delta(self) -> Tensor | None:
        """What an additive form adds at strength 1, whatever the weight; None for other forms.

        A few values that stand beside factors are left out: their places are only known to fit with the weight.
        """
        form = self.form
        if form is None or form not in _ADDITIVE:
            return None
        index, count = self.share
        return _whole(form, lambda: _ADDITIVE[form][1](self.parts)).chunk(count)[index]

    def _sparse(self, shape: torch.Size) -> Tensor:
        index, count = self.share
        try:
            whole = torch.Size([shape[0] * count, *shape[1:]])
            return _whole(_SPARSE, lambda: forms.sparse(self.parts, whole)).chunk(count)[index]
        except (IndexError, RuntimeError) as error:
            raise ModelError(f"its few values do not fit: {error}") from None

    @property
    def form(self) -> str | None:
        """Its name; None where only a bias is changed. Raises ModelError where it is none that is known."""
        found = next((name for name, marks in _MARKS.items() if any(mark in self.parts for mark in marks)), None)
        if found is None and "diff_b" not in self.parts:
            raise ModelError(f"none of its parts ({', '.join(self.parts)}) is of a form that is known")
        return found

    @property
    def unused(self) -> list[str]:
        """Parts that its form does not read: those of a second form."""
        if not any(mark in self.parts for marks in _MARKS.values() for mark in marks):
            return []
        form = self.form
        foreign = {mark for name, marks in _MARKS.items() if name not in (form, _SPARSE) for mark in marks}
        return [part for part in self.parts if part in foreign and part not in _MARKS.get(form or "", ())]

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(up (out, r), down (r, in, ...)), scaled, of a change that is their product and nothing more; else None."""
        if self.form != "LoRA" or {"lora_mid.weight", "dora_scale", "dora_rows", "bias_values"} & set(self.parts):
            return None
        if not {"lora_up.weight", "lora_down.weight"} <= set(self.parts):
            return None  # said by `change`
        up, down = self.parts["lora_up.weight"], self.parts["lora_down.weight"]
        index, count = self.share
        return up.flatten(1).chunk(count)[index] * forms.scale(self.parts, down.shape[0]), down

    @property
    def rank(self) -> int | None:
        """Of a LoRA; None for other forms."""
        return self.parts["lora_down.weight"].shape[0] if "lora_down.weight" in self.parts else None


def _whole(form: str, make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives; a part that it misses is a ModelError."""
    try:
        return make()
    except KeyError as missing:
        raise ModelError(f"it is a {form} without its part {missing.args[0]}") from None


def _dora(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """m (W + delta) / |W + delta| - W, the length taken of each column, or row, that has a magnitude.

    Which of the two is told by the magnitude's own shape: (1, in, 1, 1), or (out,) and (out, 1, 1, 1).
    """
    moved = weight + delta
    by_row = magnitude.numel() == weight.shape[0] and not (magnitude.ndim > 1 and magnitude.shape[0] == 1)
    if by_row:
        length = moved.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    else:
        length = moved.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
    if magnitude.numel() != length.numel():
        raise ModelError(f"its DoRA magnitude has {magnitude.numel()} numbers, expected {length.numel()}")
    return magnitude.reshape(length.shape) * moved / length.clamp_min(torch.finfo(weight.dtype).eps) - weight


# Form -> (parts any of which tells it, how its change is made). The first that fits counts.
_ADDITIVE: Mapping[str, tuple[tuple[str, ...], Callable[[Parts], Tensor]]] = {
    "LoRA": (("lora_up.weight", "lora_down.weight"), forms.lora),
    "LoHa": (("hada_w1_a", "hada_w1_b"), forms.loha),
    "LoKr": (("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"), forms.lokr),
    "full difference": (("diff",), forms.full),
}
_SPARSE = "sparse difference"


def _oft(parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """Blocks of OFT, or, with one dimension more, of BOFT."""
    butterfly = "oft_blocks" in parts and parts["oft_blocks"].ndim == 4
    return (forms.boft if butterfly else forms.oft)(parts, weight, strength)


_MULTIPLICATIVE: Mapping[str, tuple[tuple[str, ...], Callable[[Parts, Tensor, float], Tensor]]] = {
    "GLoRA": (("a1.weight", "a2.weight", "b1.weight", "b2.weight"), forms.glora),
    "IA3": (("on_input", "weight"), forms.ia3),
    "PEFT's IA3": (("ia3_l",), forms.peft_ia3),
    "OFT": (("oft_blocks", "oft_diag"), _oft),
    "PEFT's OFT": (("oft_R.weight",), forms.peft_oft),
    "PEFT's BOFT": (("boft_R",), forms.peft_boft),
}
_MARKS: Mapping[str, tuple[str, ...]] = {
    **{name: marks for name, (marks, _) in _ADDITIVE.items()},
    _SPARSE: ("bias_values",),
    **{name: marks for name, (marks, _) in _MULTIPLICATIVE.items()},
}

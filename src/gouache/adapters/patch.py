"""An adapter's change of one module: the new weight (and bias), for every form of adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gouache.adapters import forms
from gouache.adapters.forms import Parts
from gouache.errors import ModelError

# Suffixes of other formats -> the suffixes of kohya's and LyCORIS' files.
PART_ALIASES: Mapping[str, str] = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_B.bias": "lora_up.bias",
    "lora.up.bias": "lora_up.bias",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_rows",  # PEFT's, always one value per row
    "lora_magnitude_vector.weight": "dora_rows",
    "w_norm": "diff",
    "b_norm": "diff_b",
}


@dataclass(frozen=True)
class Patch:
    """The part of an adapter that changes one module. `parts` are in float32.

    `share` (i, n): the file has one change for n modules, concatenated by rows (OpenCLIP's fused query, key and value);
    this module is number i of them.
    """

    parts: Parts
    share: tuple[int, int] = (0, 1)

    def weight(self, weight: Tensor, strength: float) -> Tensor:
        """The new weight, float32, shaped like `weight`. Raises ModelError if the shapes do not fit."""
        old = weight.float()
        change = self.change(old, strength)
        return old if change is None else old + change

    def bias(self, bias: Tensor, strength: float) -> Tensor:
        """The new bias, float32. Raises ModelError if the shapes do not fit."""
        delta = self.bias_delta(bias)
        return bias.float() if delta is None else bias.float() + strength * delta

    def bias_delta(self, bias: Tensor) -> Tensor | None:
        """The change of the bias at strength 1; None if the adapter does not change it."""
        if "diff_b" not in self.parts:
            return None
        index, count = self.share
        delta = self.parts["diff_b"].chunk(count)[index]
        if delta.shape != bias.shape:
            raise ModelError(f"its bias delta is {list(delta.shape)}, the bias is {list(bias.shape)}")
        return delta

    def change(self, weight: Tensor, strength: float) -> Tensor | None:
        """The change of `weight`, float32, shaped like it; None if only the bias changes. Raises ModelError."""
        if (form := self.form) is None:
            return None
        if form in _MULTIPLICATIVE:
            if self.share != (0, 1):
                raise ModelError(f"it is a {form} for several fused modules; only additive forms can be split")
            return _computed(form, lambda: _MULTIPLICATIVE[form][1](self.parts, weight, strength))
        delta = self._sparse(weight.shape) if form == _SPARSE else self.delta()
        assert delta is not None
        delta = _widened(delta, weight.shape)
        if delta.numel() != weight.numel() or delta.shape[0] != weight.shape[0]:
            raise ModelError(f"its delta is {list(delta.shape)}, the weight is {list(weight.shape)}")
        delta = delta.reshape(weight.shape)  # a 1x1 convolution and a linear layer are the same matrix
        if form != _SPARSE and "bias_values" in self.parts:
            delta = delta + self._sparse(weight.shape)
        if "dora_rows" in self.parts:
            return strength * _dora(weight, delta, self.parts["dora_rows"].flatten())
        if "dora_scale" in self.parts:
            return strength * _dora(weight, delta, self.parts["dora_scale"])
        return strength * delta

    def delta(self) -> Tensor | None:
        """The delta of an additive form at strength 1, which does not depend on the weight; None for other forms.

        A sparse residual stored with the factors is not included: its indices can only be checked with the weight.
        """
        form = self.form
        if form is None or form not in _ADDITIVE:
            return None
        index, count = self.share
        return _computed(form, lambda: _ADDITIVE[form][1](self.parts)).chunk(count)[index]

    def _sparse(self, shape: torch.Size) -> Tensor:
        index, count = self.share
        try:
            whole = torch.Size([shape[0] * count, *shape[1:]])
            return _computed(_SPARSE, lambda: forms.sparse(self.parts, whole)).chunk(count)[index]
        except (IndexError, RuntimeError) as error:
            raise ModelError(f"its sparse values do not fit: {error}") from None

    @property
    def form(self) -> str | None:
        """The form's name; None if only the bias changes. Raises ModelError if no known form matches."""
        found = next((name for name, names in _IDENTIFYING.items() if any(part in self.parts for part in names)), None)
        if found is None and "diff_b" not in self.parts:
            raise ModelError(f"its parts ({', '.join(self.parts)}) match no known adapter form")
        return found

    @property
    def unused(self) -> list[str]:
        """The parts that its form does not use, which belong to a second form."""
        if not any(part in self.parts for names in _IDENTIFYING.values() for part in names):
            return []
        form = self.form
        foreign = {part for name, names in _IDENTIFYING.items() if name not in (form, _SPARSE) for part in names}
        return [part for part in self.parts if part in foreign and part not in _IDENTIFYING.get(form or "", ())]

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(up (out, r), down (r, in, ...)), scaled, if the change is just their product; otherwise None."""
        if self.form != "LoRA" or {"lora_mid.weight", "dora_scale", "dora_rows", "bias_values"} & set(self.parts):
            return None
        if not {"lora_up.weight", "lora_down.weight"} <= set(self.parts):
            return None  # `change` raises the error
        up, down = self.parts["lora_up.weight"], self.parts["lora_down.weight"]
        if down.ndim == 4 and down.shape[1] == LATENT_CHANNELS:
            return None  # of a first convolution, which may have more channels (`_widened`)
        index, count = self.share
        up = up.flatten(1) if count == 1 else up.flatten(1).chunk(count)[index]
        return forms.scaled(up, forms.scale(self.parts, len(down))), down

    @property
    def rank(self) -> int | None:
        """The rank of a LoRA; None for other forms."""
        return self.parts["lora_down.weight"].shape[0] if "lora_down.weight" in self.parts else None


LATENT_CHANNELS = 4


def _widened(delta: Tensor, shape: torch.Size) -> Tensor:
    """The delta of a first convolution for an inpainting, edit or depth model: further input channels are unchanged."""
    first = delta.ndim == len(shape) == 4 and delta.shape[1] == LATENT_CHANNELS < shape[1] < 4 * LATENT_CHANNELS
    if not first or delta.shape[0] != shape[0] or delta.shape[2:] != shape[2:]:
        return delta
    return torch.cat([delta, delta.new_zeros(shape[0], shape[1] - LATENT_CHANNELS, *shape[2:])], 1)


def _computed(form: str, compute: Callable[[], Tensor]) -> Tensor:
    """The result of `compute`. Raises ModelError if a part is missing."""
    try:
        return compute()
    except KeyError as missing:
        raise ModelError(f"it is a {form} without the part {missing.args[0]}") from None


def _dora(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """The change of DoRA. The magnitude's shape shows its side: (1, in, 1, 1) is per column, (out,) per row."""
    by_row = magnitude.numel() == weight.shape[0] and not (magnitude.ndim > 1 and magnitude.shape[0] == 1)
    expected = weight.shape[0 if by_row else 1]
    if magnitude.numel() != expected:
        raise ModelError(f"its DoRA magnitude has size {magnitude.numel()}, expected {expected}")
    return forms.dora(weight, delta, magnitude, by_row)


# Form -> (parts any of which identifies it, function that computes the change). The first match is used.
_ADDITIVE: Mapping[str, tuple[tuple[str, ...], Callable[[Parts], Tensor]]] = {
    "LoRA": (("lora_up.weight", "lora_down.weight"), forms.lora),
    "LoHa": (("hada_w1_a", "hada_w1_b"), forms.loha),
    "LoKr": (("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"), forms.lokr),
    "full difference": (("diff",), forms.full),
}
_SPARSE = "sparse difference"


def _replaced(parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """ComfyUI's `set_weight`: at strength 1 the weight is the stored one."""
    new = parts["set_weight"]
    if new.numel() != weight.numel() or new.shape[:1] != weight.shape[:1]:
        raise ModelError(f"its set_weight is {list(new.shape)}, the weight is {list(weight.shape)}")
    return strength * (new.reshape(weight.shape) - weight)


def _oft(parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """OFT, or BOFT, whose blocks have one more dimension."""
    butterfly = "oft_blocks" in parts and parts["oft_blocks"].ndim == 4
    return (forms.boft if butterfly else forms.oft)(parts, weight, strength)


_MULTIPLICATIVE: Mapping[str, tuple[tuple[str, ...], Callable[[Parts, Tensor, float], Tensor]]] = {
    "set weight": (("set_weight",), _replaced),
    "GLoRA": (("a1.weight", "a2.weight", "b1.weight", "b2.weight"), forms.glora),
    "IA3": (("on_input", "weight"), forms.ia3),
    "PEFT's IA3": (("ia3_l",), forms.peft_ia3),
    "OFT": (("oft_blocks", "oft_diag"), _oft),
    "PEFT's OFT": (("oft_R.weight",), forms.peft_oft),
    "PEFT's BOFT": (("boft_R",), forms.peft_boft),
}
_IDENTIFYING: Mapping[str, tuple[str, ...]] = {
    **{name: names for name, (names, _) in _ADDITIVE.items()},
    _SPARSE: ("bias_values",),
    **{name: names for name, (names, _) in _MULTIPLICATIVE.items()},
}

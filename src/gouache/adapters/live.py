"""A patch applied while its module runs: its contribution to the output is added, and the weight is left alone.

All modules that adapters change (linear layers, convolutions, norms, embeddings) are linear in their weight, so a
change of the weight adds to the output what the module would compute with the change alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.adapters import forms
from gouache.adapters.parameters import Dropout, TrainedPatch
from gouache.adapters.patch import Patch
from gouache.adapters.read import SHAPE_ERRORS
from gouache.errors import ModelError


class LivePatch:
    """What one patch adds to one module's output, as a forward hook.

    `beneath` returns the weight it acts on, for forms that depend on it; `error` is the start of its messages. Where
    the patch is being trained, its factors are computed from its parameters at each call, under autograd; otherwise
    what can be computed once is kept. Its dropout acts where gradients are enabled.
    """

    def __init__(self, module: nn.Module, patch: Patch, beneath: Callable[[], Tensor], error: str) -> None:
        self.on = True
        self._strength = 0.0
        self._patch, self._beneath, self._error = patch, beneath, error
        self._trained = isinstance(patch, TrainedPatch)
        self._dropout = patch.dropout if isinstance(patch, TrainedPatch) else None
        # An embedding is looked up by integers, which no factor can multiply.
        self._by_factors = isinstance(module, nn.Linear | nn.Conv2d) and patch.factors is not None
        self._factors: tuple[Tensor, Tensor] | None = None
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._valid = False
        self._handle = module.register_forward_hook(self._add)

    def set(self, strength: float) -> None:
        if strength != self._strength:
            self._strength, self._valid = strength, False

    def invalidate(self) -> None:
        """Compute again: the weight beneath has changed, and some forms depend on it."""
        self._valid = False

    def changed(self, weight: Tensor) -> Tensor:
        """`weight` changed by the patch, float32."""
        return self._patch.weight(weight, self._strength) if self._strength else weight

    def remove(self) -> None:
        self._handle.remove()

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self.on or not self._strength:
            return output
        dropout = self._dropout if torch.is_grad_enabled() else None
        if dropout is not None and dropout.skips:
            return output
        if not self._valid or self._trained:
            try:
                if self._trained:
                    self._compute(module, dropout)
                else:
                    with torch.inference_mode(False), torch.no_grad():
                        self._compute(module, None)
            except (ModelError, *SHAPE_ERRORS) as error:
                raise ModelError(f"{self._error}: {error}") from None
        extra = None
        if self._factors is not None:
            extra = _product(module, inputs[0], *self._factors, dropout)
        elif self._weight is not None:
            extra = _run(module, inputs[0], self._weight.to(inputs[0].device), None)
            extra = extra if dropout is None else dropout.of_values(extra)
        if self._bias is not None:
            bias = self._bias.reshape(-1, 1, 1) if isinstance(module, nn.Conv2d | nn.GroupNorm) else self._bias
            extra = bias.to(output) if extra is None else extra + bias.to(extra)
        return output if extra is None else output + extra.to(output.dtype)

    def _compute(self, module: nn.Module, dropout: Dropout | None) -> None:
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        patch = self._patch if dropout is None else replace(self._patch, parts=dropout.of_parts(self._patch.parts))
        if self._by_factors:
            factors = patch.factors
            assert factors is not None
            self._factors = forms.scaled(factors[0], self._strength), factors[1]
        else:
            change = patch.change(self._beneath(), self._strength)
            self._weight = change if change is None else change.to(_compute_dtype(weight))
        delta = patch.bias_delta(bias) if isinstance(bias, Tensor) else None
        self._bias = None if delta is None else delta * self._strength
        self._valid = True


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a module with such weights computes."""
    return weight.dtype if weight.element_size() > 1 else torch.float32


def _product(module: nn.Module, x: Tensor, up: Tensor, down: Tensor, dropout: Dropout | None) -> Tensor:
    """up (down x) of a linear layer or a convolution, whichever of the two forms the file stores."""
    convolution = isinstance(module, nn.Conv2d)
    inner = down.reshape(len(down), module.in_channels, *module.kernel_size) if convolution else down.flatten(1)
    values = _run(module, x, inner.to(x), None)
    values = values if dropout is None else dropout.of_values(values)
    return F.conv2d(values, up[..., None, None].to(x)) if convolution else F.linear(values, up.to(x))


def _run(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The module's output with another weight."""
    match module:
        case nn.Conv2d():
            return F.conv2d(x, weight.to(x.dtype), bias, module.stride, module.padding, module.dilation, module.groups)
        case nn.Linear():
            return F.linear(x, weight.to(x.dtype), bias)
        case nn.Embedding():
            return F.embedding(x, weight)
        case nn.GroupNorm():
            return F.group_norm(x, module.num_groups, weight.to(x.dtype), bias, module.eps)
        case nn.LayerNorm():
            return F.layer_norm(x, module.normalized_shape, weight.to(x.dtype), bias, module.eps)
        case _:
            raise ModelError(f"an adapter cannot act live on a {type(module).__name__}; fold it in instead")

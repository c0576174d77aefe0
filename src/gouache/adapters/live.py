"""A patch that acts as its module runs: what it makes of the input is added to the output, the weight left alone.

Everything that adapters change (linear layers, convolutions, norms, embeddings) is linear in its weight, so a weight's
change does to the input what the changed weight would do beyond the old one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.adapters.patch import Patch
from gouache.adapters.read import WRONG
from gouache.errors import ModelError


class Live:
    """What one patch adds to one module's output as it runs.

    `beneath` gives the weight that it acts on, for forms to which that matters; `named` begins its errors.
    """

    def __init__(self, module: nn.Module, patch: Patch, beneath: Callable[[], Tensor], named: str) -> None:
        self.on = True
        self._strength = 0.0
        self._patch, self._beneath, self._named = patch, beneath, named
        # Positions and the like are looked up as integers, which no factor can multiply.
        self._factors = patch.factors if isinstance(module, nn.Linear | nn.Conv2d) else None
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._made = False
        self._handle = module.register_forward_hook(self._add)

    def set(self, strength: float) -> None:
        if strength != self._strength:
            self._strength, self._made = strength, False

    def stale(self) -> None:
        """The weight beneath has changed, and with it what some forms make of it."""
        self._made = False

    def changed(self, weight: Tensor) -> Tensor:
        """What the patch makes of `weight`, float32."""
        return self._patch.weight(weight, self._strength) if self._strength else weight

    def remove(self) -> None:
        self._handle.remove()

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self.on or not self._strength:
            return output
        if not self._made:
            try:
                self._make(module)
            except (ModelError, *WRONG) as error:
                raise ModelError(f"{self._named}: {error}") from None
        extra = None
        if self._factors is not None:
            extra = _product(module, inputs[0], self._factors[0] * self._strength, self._factors[1])
        elif self._weight is not None:
            extra = _run(module, inputs[0], self._weight.to(inputs[0].device), None)
        if self._bias is not None:
            spread = self._bias.reshape(-1, 1, 1) if isinstance(module, nn.Conv2d | nn.GroupNorm) else self._bias
            extra = spread.to(output) if extra is None else extra + spread.to(extra)
        return output if extra is None else output + extra.to(output.dtype)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _make(self, module: nn.Module) -> None:
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        if self._factors is None:
            change = self._patch.change(self._beneath(), self._strength)
            self._weight = change if change is None else change.to(_computing(weight))
        delta = self._patch.bias_delta(bias) if isinstance(bias, Tensor) else None
        self._bias = None if delta is None else delta * self._strength
        self._made = True


def _computing(weight: Tensor) -> torch.dtype:
    """The dtype that a module of such weights computes in."""
    return weight.dtype if weight.element_size() > 1 else torch.float32


def _product(module: nn.Module, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """up (down x), the module being a linear layer or a convolution; whichever form the file has it in."""
    if isinstance(module, nn.Conv2d):
        inner = down.reshape(len(down), module.in_channels, *module.kernel_size).to(x)
        return F.conv2d(_run(module, x, inner, None), up[..., None, None].to(x))
    return F.linear(_run(module, x, down.flatten(1).to(x), None), up.to(x))


def _run(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the module would do with another weight. Everything that adapters change is linear in its weight."""
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

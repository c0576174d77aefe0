"""Adapters on the weights of networks: put on, counted, and taken off without a trace.

Two ways, of the same result up to rounding. Folded: the weight itself is replaced, so that a step costs nothing more;
`restore` brings the original back. Live: the module runs as it is, and what the adapter adds is added to its output;
for strengths that change from step to step, and for weights of too few bits to fold anything into.

Networks are handed in as modules by name, and originals as a function; no model is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.adapters.patch import Patch
from gouache.adapters.read import Adapter
from gouache.adapters.strength import Strength
from gouache.errors import ModelError
from gouache.layouts.modules import Module

How = Literal["folded", "live"]
Restore = Callable[[str, str], Tensor]
"""(component, tensor's name) -> the original, read again and cast as when it was loaded."""

BLOCK = 1 << 20  # elements folded at once on a CPU: what fits into its caches as float32


@dataclass(eq=False)
class Layer:
    """One adapter on the networks: which modules it changes there, and which of the file's it could not."""

    adapter: Adapter
    strength: Strength
    how: How
    modules: tuple[Module, ...]
    wrong_shape: Mapping[str, str]
    hooks: dict[Module, _Live] = field(default_factory=dict, repr=False)


class Layers:
    """Every adapter that lies on some networks, in the order in which they were attached; live ones act last."""

    def __init__(self, networks: Mapping[str, nn.Module], restore: Restore) -> None:
        self._networks, self._restore = networks, restore
        self._layers: list[Layer] = []
        self._changed = set[Module]()  # modules whose weights are not the originals

    def __iter__(self) -> Iterator[Layer]:
        return iter(tuple(self._layers))

    def attach(self, adapter: Adapter, strength: Strength, how: How | None = None) -> Layer:
        """Put `adapter` on, whole or not at all; `how` None chooses. Raises ModelError where nothing of it fits."""
        fitting, wrong = self.sort(adapter)
        if not fitting:
            some = next(iter(wrong.items()), None)
            why = f"; {some[0]}: {some[1]}" if some is not None else ""
            raise ModelError(f"{adapter.file.path} changes none of the modules of this model{why}")
        layer = Layer(adapter, strength, how or self._choose(fitting, strength), fitting, wrong)
        self._layers.append(layer)
        try:
            self._apply(layer, fitting)
        except BaseException:
            self.detach(layer)
            raise
        return layer

    def detach(self, layer: Layer) -> None:
        """Take it off: every weight that it changed is again what the others make of the original."""
        if layer not in self._layers:
            return
        self._layers.remove(layer)
        for hook in layer.hooks.values():
            hook.remove()
        layer.hooks.clear()
        if layer.how == "folded":
            self._fold(layer.modules)

    def change(self, layer: Layer, strength: Strength) -> None:
        """Another strength for an attached adapter; only modules for which it differs are touched."""
        before, layer.strength = layer.strength, strength
        if layer.how == "folded" and not strength.whole_run:
            self.detach(layer)
            layer.how = "live"
            self._layers.append(layer)
            self._apply(layer, layer.modules)
            return
        self._apply(layer, [module for module in layer.modules if before.of(module) != strength.of(module)])

    def at(self, progress: float) -> None:
        """Tell the adapters that this share of a run's steps is done."""
        for layer in self._layers:
            if not layer.strength.whole_run:
                acts = layer.strength.acts(progress)
                for module, hook in layer.hooks.items():
                    hook.on = acts or module[0] != "unet"

    def sort(self, adapter: Adapter) -> tuple[tuple[Module, ...], dict[str, str]]:
        """(modules that fit, {module: why it does not}), told from the shapes alone."""
        fitting, wrong = list[Module](), dict[str, str]()
        for module in adapter.tensors:
            there = self._module(module)
            shapes = {
                leaf: tuple(tensor.shape)
                for leaf in ("weight", "bias")
                if isinstance(tensor := getattr(there, leaf, None), Tensor)
            }
            if why := adapter.misfit(module, shapes):
                wrong[" ".join(module)] = why
            else:
                fitting.append(module)
        return tuple(fitting), wrong

    def _choose(self, modules: Iterable[Module], strength: Strength) -> How:
        few_bits = any(self._weight(module).element_size() < 2 for module in modules)
        return "folded" if strength.whole_run and not few_bits else "live"

    def _apply(self, layer: Layer, modules: Iterable[Module]) -> None:
        if layer.how == "folded":
            self._fold(modules)
            return
        for module in modules:
            if module not in layer.hooks:
                layer.hooks[module] = _Live(self._module(module), layer.adapter, module)
            layer.hooks[module].set(layer.strength.of(module))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _fold(self, modules: Iterable[Module]) -> None:
        """Make each module's weights anew: the original, with every folded adapter on it."""
        for module in modules:
            there = self._module(module)
            fresh = module not in self._changed  # then its weights are the originals, and need not be read again
            on = [
                (layer.adapter.patch(module, there.weight.device), strength)  # type: ignore[union-attr]
                for layer in self._layers
                if layer.how == "folded" and module in layer.modules and (strength := layer.strength.of(module))
            ]
            for leaf in ("weight", "bias"):
                now = getattr(there, leaf, None)
                if not isinstance(now, Tensor):
                    continue
                made = now.data if fresh else self._restore(module[0], f"{module[1]}.{leaf}").to(now.device, now.dtype)
                if on and leaf == "weight":
                    made = folded(made, on)
                elif on:
                    made = _folded_bias(made, on)
                if made.stride() != now.stride():  # channels-last, as it was loaded
                    made = torch.empty_strided(now.shape, now.stride(), dtype=now.dtype, device=now.device).copy_(made)
                setattr(there, leaf, nn.Parameter(made, requires_grad=now.requires_grad))
                self._changed.add(module)
            if not on:
                self._changed.discard(module)
            for layer in self._layers:
                if module in layer.hooks:
                    layer.hooks[module].stale()

    def _module(self, module: Module) -> nn.Module:
        return self._networks[module[0]].get_submodule(module[1])

    def _weight(self, module: Module) -> Tensor:
        weight = self._module(module).weight
        assert isinstance(weight, Tensor)
        return weight


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
        wide = made[block] if made.dtype == torch.float32 else scratch[: len(rows[block])]
        made[block].copy_(wide.copy_(rows[block]).addmm_(up[block], down))
    return made.reshape(weight.shape)


def _halves(factor: Tensor) -> tuple[Tensor, Tensor]:
    """(bfloat16, what that leaves over as bfloat16)"""
    whole = factor.bfloat16()
    return whole, (factor - whole.float()).bfloat16()


def _folded_bias(bias: Tensor, patches: Iterable[tuple[Patch, float]]) -> Tensor:
    made = bias
    for patch, strength in patches:
        made = patch.bias(made, strength)
    return made.to(bias.dtype)


class _Live:
    """What one adapter adds to one module's output as it runs."""

    def __init__(self, module: nn.Module, adapter: Adapter, name: Module) -> None:
        self.on = True
        self._strength = 0.0
        self._module = module
        self._patch = adapter.patch(name, module.weight.device)  # type: ignore[union-attr,arg-type]
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._made = False
        self._handle = module.register_forward_hook(self._add)

    def set(self, strength: float) -> None:
        if strength != self._strength:
            self._strength, self._made = strength, False

    def stale(self) -> None:
        """The weight beneath has changed, and with it what a form makes of it."""
        self._made = False

    def remove(self) -> None:
        self._handle.remove()

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self.on or not self._strength:
            return output
        if not self._made:
            self._make(module)
        pair = self._patch.factors
        extra = None
        if pair is not None:
            extra = _product(module, inputs[0], pair[0] * self._strength, pair[1])
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
        if self._patch.factors is None:
            change = self._patch.change(weight.float(), self._strength)
            # A norm's weight is added to what it normalised, so nothing else of it may come in.
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

"""Adapters on the weights of networks: put on, counted, and taken off without a trace.

Two ways, of the same result up to rounding. Folded: the weight itself is replaced, so that a step costs nothing more;
`restore` brings the original back. Live: the module runs as it is, and what the adapter adds is added to its output;
for strengths that change from step to step, and for weights of too few bits to fold anything into.

Networks are handed in as modules by name, and originals as a function; no model is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from gouache.adapters.fold import Fold, fold, folded_bias
from gouache.adapters.live import Live
from gouache.adapters.patch import Patch
from gouache.adapters.read import WRONG, Adapter
from gouache.adapters.strength import Strength
from gouache.errors import ModelError
from gouache.layouts.modules import Module

How = Literal["folded", "live"]
Restore = Callable[[str, str], Tensor]
"""(component, tensor's name) -> the original, read again and cast as when it was loaded."""


HELD = 1 << 28  # bytes of patches read before the weights that they change are made


@dataclass(eq=False)
class Layer:
    """One adapter on the networks: which modules it changes there, and which of the file's it could not."""

    adapter: Adapter
    strength: Strength
    how: How
    modules: Mapping[Module, None]  # in the file's order
    wrong_shape: Mapping[str, str]
    hooks: dict[Module, Live] = field(default_factory=dict, repr=False)


Patches = list[tuple[Patch, float, Layer]]
"""What lies on one module: patches at their strengths, and whose they are."""


class Layers:
    """Every adapter that lies on some networks, in the order of attaching; live ones act after folded ones."""

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
        layer = Layer(adapter, strength, how or self._choose(fitting, strength), dict.fromkeys(fitting), wrong)
        self._layers.append(layer)
        try:
            self._apply(layer, fitting)
        except BaseException:
            self.detach(layer)
            raise
        return layer

    def detach(self, layer: Layer) -> None:
        """Take it off: every weight that it changed is again what the others make of the original.

        Interrupted, it goes on to its end before it says so: nothing may be left half off.
        """
        try:
            self._take_off(layer)
        except BaseException:
            self._take_off(layer)
            raise

    def _take_off(self, layer: Layer) -> None:
        while layer.hooks:
            module = next(iter(layer.hooks))
            layer.hooks[module].remove()
            del layer.hooks[module]
            self._stale(module)
        if layer in self._layers:
            self._layers.remove(layer)
        if layer.how == "folded":
            self._fold(module for module in layer.modules if module in self._changed)

    def change(self, layer: Layer, strength: Strength) -> None:
        """Another strength for an attached adapter; only modules for which it differs are touched.

        Raises ModelError where it is not attached any more.
        """
        if layer not in self._layers:
            raise ModelError(f"{layer.adapter.file.path} is not attached; attach it again")
        before = layer.strength
        if layer.how == "folded" and not strength.whole_run:
            self.detach(layer)
            layer.how, layer.strength = "live", strength
            self._layers.append(layer)
            self._apply(layer, layer.modules)
            return
        touched = [module for module in layer.modules if before.of(module) != strength.of(module)]
        layer.strength = strength
        try:
            self._apply(layer, touched)
        except BaseException:
            layer.strength = before
            self._apply(layer, touched)
            raise

    def at(self, progress: float) -> None:
        """Tell the adapters that this share of a run's steps is done."""
        for layer in self._layers:
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
                patch = layer.adapter.patch(module, self._weight(module).device)
                beneath = partial(self._beneath, layer, module)
                layer.hooks[module] = Live(self._module(module), patch, beneath, self._named(layer, module))
            layer.hooks[module].set(layer.strength.of(module))
            self._stale(module)
        self.at(0.0)

    def _beneath(self, layer: Layer, module: Module) -> Tensor:
        """The module's weight, float32, with the live adapters on it that were attached before `layer`."""
        weight = self._weight(module).float()
        for other in self._layers[: self._layers.index(layer)]:
            if module in other.hooks:
                weight = other.hooks[module].changed(weight)
        return weight

    def _stale(self, module: Module) -> None:
        """The weight beneath the live adapters of `module` is another now."""
        for layer in self._layers:
            if module in layer.hooks:
                layer.hooks[module].stale()

    def _named(self, layer: Layer, module: Module) -> str:
        return f"{layer.adapter.file.path} does not fit {' '.join(module)}"

    @torch.inference_mode(False)
    @torch.no_grad()
    def _fold(self, modules: Iterable[Module]) -> None:
        """Make each module's weights anew: the original, with every folded adapter on it."""
        ready: list[tuple[Module, Patches, Fold | None]] = []
        held = 0
        for module in list(modules):
            on = [
                (layer.adapter.patch(module, self._weight(module).device), strength, layer)
                for layer in self._layers
                if layer.how == "folded" and module in layer.modules and (strength := layer.strength.of(module))
            ]
            with self._naming(on, module):
                ready.append((module, on, fold(self._weight(module), [(p, s) for p, s, _ in on]) if on else None))
            held += sum(part.nbytes for patch, *_ in on for part in patch.parts.values())
            if held > HELD:
                self._make(ready)
                ready, held = [], 0
        self._make(ready)

    def _make(self, ready: Iterable[tuple[Module, Patches, Fold | None]]) -> None:
        for module, on, change in ready:
            there = self._module(module)
            fresh = module not in self._changed  # then its weights are the originals, and need not be read again
            self._changed.add(module)  # before it is: an interrupt may come at any place
            for leaf in ("weight", "bias"):
                now = getattr(there, leaf, None)
                stays = fresh and leaf == "bias" and not any("diff_b" in patch.parts for patch, *_ in on)
                if not isinstance(now, Tensor) or stays:
                    continue
                made = now.data if fresh else self._restore(module[0], f"{module[1]}.{leaf}").to(now.device, now.dtype)
                if change is not None:
                    with self._naming(on, module):
                        made = change(made) if leaf == "weight" else folded_bias(made, [(p, s) for p, s, _ in on])
                if made.stride() != now.stride():  # channels-last, as it was loaded
                    made = torch.empty_strided(now.shape, now.stride(), dtype=now.dtype, device=now.device).copy_(made)
                setattr(there, leaf, nn.Parameter(made, requires_grad=now.requires_grad))
            if not on:
                self._changed.discard(module)
            self._stale(module)

    @contextmanager
    def _naming(self, on: Patches, module: Module) -> Iterator[None]:
        """Whatever does not fit is a ModelError that names the file and the module."""
        try:
            yield
        except (ModelError, *WRONG) as error:
            raise ModelError(f"{self._named(on[-1][2], module)}: {error}") from None

    def _module(self, module: Module) -> nn.Module:
        return self._networks[module[0]].get_submodule(module[1])

    def _weight(self, module: Module) -> Tensor:
        weight = self._module(module).weight
        assert isinstance(weight, Tensor)
        return weight

"""Adapters on the weights of networks: attached, counted, and detached without a trace.

Two ways, with the same result up to rounding. Folded: the weight itself is replaced, so that a step costs nothing
more; `restore` brings the original back. Live: the module runs unchanged, and the adapter's contribution is added to
its output; for strengths that change from step to step, for weights of too few bits to fold anything into, and for
adapters that are being trained.

Networks are passed as modules by name, and originals as a function; no model is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from gouache.adapters.fold import Fold, fold, folded_bias
from gouache.adapters.live import LivePatch
from gouache.adapters.patch import Patch
from gouache.adapters.read import SHAPE_ERRORS
from gouache.adapters.strength import Strength
from gouache.errors import ModelError
from gouache.layouts.modules import Module

How = Literal["folded", "live"]
Restore = Callable[[str, str], Tensor]
"""(component, tensor name) -> the original, read again and cast as it was when it was loaded."""

READ_AHEAD = 1 << 28  # bytes of patches that are read before the weights they change are computed


class PatchSource(Protocol):
    """Patches by module: an adapter file (`adapters.read.AdapterFile`) or parameters (`adapters.parameters`)."""

    @property
    def name(self) -> str:
        """For messages: the path of a file."""
        ...

    @property
    def target_modules(self) -> Collection[Module]: ...

    def patch(self, module: Module, device: torch.device | str = "cpu") -> Patch: ...

    def mismatch(self, module: Module, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Why the patch does not fit a module with these tensor shapes; "" where it does."""
        ...


@dataclass(eq=False)
class AttachedAdapter:
    """One adapter on the networks: the modules it changes, and those of its own that do not fit."""

    source: PatchSource
    strength: Strength
    how: How
    modules: Mapping[Module, None]  # in the order of the file
    wrong_shape: Mapping[str, str]
    hooks: dict[Module, LivePatch] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class Suspended:
    """Adapters that were detached for a while, with the weights they were folded into, if these were kept."""

    adapters: tuple[AttachedAdapter, ...]
    folded: Mapping[Module, Mapping[str, nn.Parameter]]
    version: int
    originals: Mapping[Module, object] = field(default_factory=dict)  # tells whether a weight was changed since


Patches = list[tuple[Patch, float, AttachedAdapter]]
"""The patches of one module, their strengths, and the adapters they belong to."""


class Adapters:
    """All adapters attached to some networks, in the order of attaching; live ones act after folded ones."""

    def __init__(self, networks: Mapping[str, nn.Module], restore: Restore) -> None:
        self._networks, self._restore = networks, restore
        self._attached: list[AttachedAdapter] = []
        self._changed = set[Module]()  # modules whose weights are not the originals
        self._kept: dict[Module, dict[str, nn.Parameter]] = {}  # originals that no file has
        self._version = 0  # of the list, for `resume`

    def __iter__(self) -> Iterator[AttachedAdapter]:
        return iter(tuple(self._attached))

    def attach(self, source: PatchSource, strength: Strength, how: How | None = None) -> AttachedAdapter:
        """Attach `source`, whole or not at all; `how` None chooses. Raises ModelError if none of its modules fits."""
        fitting, wrong = self.sort(source)
        if not fitting:
            first = next(iter(wrong.items()), None)
            why = f"; {first[0]}: {first[1]}" if first is not None else ""
            raise ModelError(f"{source.name} changes none of the modules of this model{why}")
        attached = AttachedAdapter(
            source, strength, how or self._choose(fitting, strength), dict.fromkeys(fitting), wrong
        )
        self._add(attached)
        try:
            self._apply(attached, fitting)
        except BaseException:
            self.detach(attached)
            raise
        return attached

    def detach(self, attached: AttachedAdapter) -> None:
        """Detach it: every weight it changed becomes what the other adapters make of the original.

        An interrupt is raised only after the work is complete: nothing may be left half detached.
        """
        try:
            self._detach([attached])
        except BaseException:
            self._detach([attached])
            raise

    def suspend(self, adapters: Iterable[AttachedAdapter], keep_bytes: int) -> Suspended:
        """Detach `adapters` so that `resume` costs little: up to `keep_bytes` of folded weights are kept."""
        adapters = tuple(each for each in self._attached if each in set(adapters))
        modules = {m for each in adapters if each.how == "folded" for m in each.modules if m in self._changed}
        folded = {module: dict(self._module(module).named_parameters(recurse=False)) for module in modules}
        if sum(parameter.nbytes for leaves in folded.values() for parameter in leaves.values()) > keep_bytes:
            folded = {}
        try:
            self._detach(adapters)
        except BaseException:
            self._detach(adapters)
            raise
        originals = {module: _state(self._module(module)) for module in folded}
        return Suspended(adapters, folded, self._version, originals)

    def resume(self, suspended: Suspended) -> None:
        """Attach again what was suspended; nothing is folded again if no other adapter has changed meanwhile."""
        unchanged = suspended.version == self._version
        done = set[Module]()
        try:
            for attached in suspended.adapters:
                self._add(attached)
                if attached.how == "live" or not unchanged or not self._put(attached, suspended, done):
                    self._apply(attached, attached.modules)
        except BaseException:
            for attached in suspended.adapters:
                self.detach(attached)
            raise

    def _put(self, attached: AttachedAdapter, suspended: Suspended, done: set[Module]) -> bool:
        """Put kept weights back into the modules of `attached`; False if they are missing or out of date.

        `done` collects modules: adapters that were suspended together share their weights.
        """
        for module in attached.modules:
            if module in done:
                continue
            there = self._module(module)
            leaves = suspended.folded.get(module)
            if leaves is None:
                if attached.strength.of(module):
                    return False
                continue
            if any(leaves[leaf].dtype != now.dtype for leaf, now in there.named_parameters(recurse=False)):
                return False
            if module not in self._changed and suspended.originals[module] != _state(there):
                return False  # trained or edited since
            self._keep(module)
            self._changed.add(module)
            for leaf, parameter in leaves.items():
                setattr(there, leaf, parameter)
            self._invalidate(module)
            done.add(module)
        return True

    def _add(self, attached: AttachedAdapter) -> None:
        self._attached.append(attached)
        self._version += 1

    def _detach(self, adapters: Iterable[AttachedAdapter]) -> None:
        """Can be run again after an interrupt."""
        adapters = tuple(adapters)
        self._version += 1
        for attached in adapters:
            while attached.hooks:
                module = next(iter(attached.hooks))
                attached.hooks[module].remove()
                del attached.hooks[module]
                self._invalidate(module)
            if attached in self._attached:
                self._attached.remove(attached)
        folded = (each for each in adapters if each.how == "folded")
        self._fold(dict.fromkeys(module for each in folded for module in each.modules if module in self._changed))

    def change(self, attached: AttachedAdapter, strength: Strength) -> None:
        """Change the strength of an attached adapter; only modules for which it differs are touched.

        Raises ModelError if it is not attached any more.
        """
        if attached not in self._attached:
            raise ModelError(f"{attached.source.name} is not attached; attach it again")
        before = attached.strength
        self._version += 1
        if attached.how == "folded" and not strength.whole_run:
            self.detach(attached)
            attached.how, attached.strength = "live", strength
            self._add(attached)
            self._apply(attached, attached.modules)
            return
        touched = [module for module in attached.modules if before.of(module) != strength.of(module)]
        attached.strength = strength
        try:
            self._apply(attached, touched)
        except BaseException:
            attached.strength = before
            self._apply(attached, touched)
            raise

    def set_progress(self, progress: float) -> None:
        """Switch adapters on and off for a step that begins when this share of a run's steps is done."""
        for attached in self._attached:
            active = attached.strength.acts(progress)
            for module, hook in attached.hooks.items():
                hook.on = active or module[0] != "unet"

    @property
    def changes_by_step(self) -> bool:
        return any(not attached.strength.whole_run for attached in self._attached)

    def sort(self, source: PatchSource) -> tuple[tuple[Module, ...], dict[str, str]]:
        """(modules that fit, {module: why it does not}), decided by shapes alone."""
        fitting, wrong = list[Module](), dict[str, str]()
        for module in source.target_modules:
            there = self._module(module)
            shapes = {
                leaf: tuple(tensor.shape)
                for leaf in ("weight", "bias")
                if isinstance(tensor := getattr(there, leaf, None), Tensor)
            }
            if why := source.mismatch(module, shapes):
                wrong[" ".join(module)] = why
            else:
                fitting.append(module)
        return tuple(fitting), wrong

    def _choose(self, modules: Iterable[Module], strength: Strength) -> How:
        few_bits = any(self._weight(module).element_size() < 2 for module in modules)
        return "folded" if strength.whole_run and not few_bits else "live"

    def _apply(self, attached: AttachedAdapter, modules: Iterable[Module]) -> None:
        if attached.how == "folded":
            self._fold(modules)
            return
        for module in modules:
            if module not in attached.hooks:
                patch = attached.source.patch(module, self._weight(module).device)
                beneath = partial(self._beneath, attached, module)
                attached.hooks[module] = LivePatch(self._module(module), patch, beneath, _error(attached, module))
            attached.hooks[module].set(attached.strength.of(module))
            self._invalidate(module)
        self.set_progress(0.0)

    def _beneath(self, attached: AttachedAdapter, module: Module) -> Tensor:
        """The module's weight, float32, with the live adapters that were attached before `attached`."""
        weight = self._weight(module).float()
        for other in self._attached[: self._attached.index(attached)]:
            if module in other.hooks:
                weight = other.hooks[module].changed(weight)
        return weight

    def _invalidate(self, module: Module) -> None:
        """The weight beneath the live adapters of `module` has changed."""
        for attached in self._attached:
            if module in attached.hooks:
                attached.hooks[module].invalidate()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _fold(self, modules: Iterable[Module]) -> None:
        """Compute each module's weights anew: the original, changed by every folded adapter in turn."""
        ready: list[tuple[Module, Patches, Fold | None]] = []
        held = 0
        for module in list(modules):
            patches = [
                (each.source.patch(module, self._weight(module).device), strength, each)
                for each in self._attached
                if each.how == "folded" and module in each.modules and (strength := each.strength.of(module))
            ]
            with _named_errors(patches, module):
                change = fold(self._weight(module), [(p, s) for p, s, _ in patches]) if patches else None
            ready.append((module, patches, change))
            held += sum(part.nbytes for patch, *_ in patches for part in patch.parts.values())
            if held > READ_AHEAD:
                self._write(ready)
                ready, held = [], 0
        self._write(ready)

    def _write(self, ready: Iterable[tuple[Module, Patches, Fold | None]]) -> None:
        for module, patches, change in ready:
            there = self._module(module)
            original = module not in self._changed  # then its weights need not be read again
            self._keep(module)
            self._changed.add(module)  # first: an interrupt may come at any place
            kept = self._kept.get(module, {})
            for leaf in ("weight", "bias"):
                now = getattr(there, leaf, None)
                unchanged = original and leaf == "bias" and not any("diff_b" in patch.parts for patch, *_ in patches)
                if not isinstance(now, Tensor) or unchanged:
                    continue
                if leaf in kept and change is None:
                    setattr(there, leaf, kept[leaf])
                    continue
                if original or leaf in kept:
                    new = (now if original else kept[leaf]).data.to(now.dtype)
                else:
                    new = self._restore(module[0], f"{module[1]}.{leaf}").to(now.device, now.dtype)
                if change is not None:
                    with _named_errors(patches, module):
                        new = change(new) if leaf == "weight" else folded_bias(new, [(p, s) for p, s, _ in patches])
                if new.stride() != now.stride():  # channels-last, as it was loaded
                    new = torch.empty_strided(now.shape, now.stride(), dtype=now.dtype, device=now.device).copy_(new)
                setattr(there, leaf, nn.Parameter(new, requires_grad=now.requires_grad))
            if not patches:
                self._changed.discard(module)
                self._kept.pop(module, None)
            self._invalidate(module)

    def _keep(self, module: Module) -> None:
        """Keep the parameters of an unchanged module that `restore` could not give back: trained or edited ones."""
        if module in self._changed:
            return
        parameters = dict(self._module(module).named_parameters(recurse=False))
        if any(parameter.requires_grad or _edits(parameter) for parameter in parameters.values()):
            self._kept[module] = parameters

    def _module(self, module: Module) -> nn.Module:
        return self._networks[module[0]].get_submodule(module[1])

    def _weight(self, module: Module) -> Tensor:
        weight = self._module(module).weight
        assert isinstance(weight, Tensor)
        return weight


def _edits(tensor: Tensor) -> int:
    """How often `tensor` was changed in place since it was loaded."""
    return 0 if tensor.is_inference() else tensor._version


def _state(module: nn.Module) -> object:
    """Equal as long as the module's parameters are the same and were not changed."""
    return [(name, id(each), _edits(each)) for name, each in module.named_parameters(recurse=False)]


def _error(attached: AttachedAdapter, module: Module) -> str:
    return f"{attached.source.name} does not fit {' '.join(module)}"


@contextmanager
def _named_errors(patches: Patches, module: Module) -> Iterator[None]:
    """Raise whatever does not fit as a ModelError that names the file and the module."""
    try:
        yield
    except (ModelError, *SHAPE_ERRORS) as error:
        raise ModelError(f"{_error(patches[-1][2], module)}: {error}") from None

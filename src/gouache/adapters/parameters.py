"""Patches whose parts are parameters: an adapter that is being trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from gouache.adapters.forms import Parts
from gouache.adapters.patch import Patch
from gouache.adapters.read import SHAPE_ERRORS
from gouache.errors import ModelError
from gouache.layouts.modules import Module


class Dropout(Protocol):
    """What is left out of one module's patch during a batch. It has no effect where gradients are disabled."""

    @property
    def skips(self) -> bool:
        """Whether the whole patch is left out."""
        ...

    def of_parts(self, parts: Parts) -> Parts:
        """`parts` without some of the ranks."""
        ...

    def of_values(self, x: Tensor) -> Tensor:
        """`x`, values that the patch computes from the module's input, without some of them."""
        ...


@dataclass(frozen=True)
class TrainedPatch(Patch):
    """A patch whose parts change at every step, with its dropout."""

    dropout: Dropout | None = None


class ParameterAdapter(nn.Module):
    """An adapter in any form that files have, with parameters as its parts; attach it live to train it.

    `parts[module]` maps the part names of `adapters.patch` (`lora_up.weight`, `lora_down.weight`, `hada_w1_a`, ...) to
    tensors. Those that require gradients become parameters, the others (alpha, for example) buffers. In `state_dict`
    they are called `component/path/to/module/part`, with dots written as slashes. `dropouts` are those of its modules.
    """

    def __init__(
        self,
        name: str,
        parts: Mapping[Module, Mapping[str, Tensor]],
        dropouts: Mapping[Module, Dropout] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self._dropouts = dict(dropouts or {})
        self._keys: dict[Module, dict[str, str]] = {}
        for module, tensors in parts.items():
            self._keys[module] = {}
            for part, tensor in tensors.items():
                key = self._keys[module][part] = state_name(module, part)
                if tensor.requires_grad or isinstance(tensor, nn.Parameter):
                    trained = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
                    self.register_parameter(key, trained)
                else:
                    self.register_buffer(key, tensor)

    @property
    def target_modules(self) -> Collection[Module]:
        return self._keys.keys()

    def keys_of(self, module: Module) -> Mapping[str, str]:
        """{part: its name in `state_dict`} of `module`."""
        return self._keys[module]

    def patch(self, module: Module, device: torch.device | str = "cpu") -> TrainedPatch:
        """The patch for `module`, made of the parameters themselves. `device` must be theirs."""
        parts = {part: getattr(self, key) for part, key in self._keys[module].items()}
        return TrainedPatch(parts, dropout=self._dropouts.get(module))

    def mismatch(self, module: Module, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Why the patch does not fit a module of these shapes; "" where it does."""
        if "weight" not in shapes:
            return "the module has no weight"
        parts = {
            part: torch.empty_like(tensor, device="meta") if tensor.numel() > 1 else tensor.detach()
            for part, tensor in self.patch(module).parts.items()
        }
        try:
            Patch(parts).weight(torch.empty(shapes["weight"], device="meta"), 1.0)
        except (ModelError, *SHAPE_ERRORS) as error:
            return str(error)
        return ""


def state_name(module: Module, part: str) -> str:
    """The name of a part in the `state_dict` of an adapter: torch allows no dots in it."""
    return "/".join((*module, part)).replace(".", "/")

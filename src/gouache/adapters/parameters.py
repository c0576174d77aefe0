"""Patches whose parts are parameters: an adapter that is being trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from gouache.adapters.patch import Patch
from gouache.adapters.read import SHAPE_ERRORS
from gouache.errors import ModelError
from gouache.layouts.modules import Module


class ParameterAdapter(nn.Module):
    """An adapter in any form that files have, with parameters as its parts; attach it live to train it.

    `parts[module]` maps the part names of `adapters.patch` (`lora_up.weight`, `lora_down.weight`, `hada_w1_a`, ...) to
    tensors. Those that require gradients become parameters, the others (alpha, for example) buffers. In `state_dict`
    they are called `component.path.to.module/part`, with dots written as slashes.
    """

    def __init__(self, name: str, parts: Mapping[Module, Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.name = name
        self._parts: dict[Module, dict[str, str]] = {}
        for module, tensors in parts.items():
            self._parts[module] = {}
            for part, tensor in tensors.items():
                key = "/".join((*module, part)).replace(".", "/")
                self._parts[module][part] = key
                if tensor.requires_grad or isinstance(tensor, nn.Parameter):
                    trained = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
                    self.register_parameter(key, trained)
                else:
                    self.register_buffer(key, tensor)

    @property
    def target_modules(self) -> Collection[Module]:
        return self._parts.keys()

    def patch(self, module: Module, device: torch.device | str = "cpu") -> Patch:
        """The patch for `module`, made of the parameters themselves. `device` must be theirs."""
        return Patch({part: getattr(self, key) for part, key in self._parts[module].items()})

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

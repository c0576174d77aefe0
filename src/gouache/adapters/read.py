"""An adapter file -> patches by module, and what of it found no module: counted, nothing passed over in silence."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gouache.adapters.patch import SAME, Patch
from gouache.files.record import ModelFile
from gouache.layouts.adapters import suffix_of
from gouache.layouts.modules import Module


@dataclass(frozen=True)
class Adapter:
    """`tensors[module][part]` is the file's name of that part. `unmatched`: names without a module -> the nearest."""

    file: ModelFile
    tensors: Mapping[Module, Mapping[str, str]]
    unmatched: Mapping[str, str]

    def patch(self, module: Module) -> Patch:
        """What the file does to `module`; read now, in float32."""
        return Patch({part: self.file.tensor(name).float() for part, name in self.tensors[module].items()})

    def sketch(self, module: Module) -> Patch:
        """The same without values, on the meta device: what shapes it has, and whether they fit each other."""
        parts = {part: torch.empty(self.file.tensors[name].shape, device="meta")
                 for part, name in self.tensors[module].items() if part != "alpha"}  # fmt: skip
        return Patch(parts)


def read_lora(file: ModelFile, names: Mapping[str, Module]) -> Adapter:
    """The patches in `file` for a model whose modules are called `names` (`layouts.modules.module_names`)."""
    tensors: dict[Module, dict[str, str]] = {}
    unmatched: dict[str, str] = {}
    for name in file:
        suffix = suffix_of(name)
        stem = name.removesuffix(suffix) if suffix else name
        module = names.get(stem.removeprefix("base_model.model."))  # which PEFT puts before everything
        if not suffix or module is None:
            near = difflib.get_close_matches(stem, names, n=1) if len(unmatched) < 20 else []
            unmatched[name] = near[0] if near else ""
            continue
        part = suffix.lstrip("._")  # what joins it to the module
        tensors.setdefault(module, {})[SAME.get(part, part)] = name
    return Adapter(file, tensors, unmatched)

"""An adapter file -> patches by module, and what of it found no module: counted, nothing passed over in silence."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gouache.adapters.config import Scales, scales
from gouache.adapters.patch import SAME, Patch
from gouache.errors import ModelError, printable
from gouache.files.record import ModelFile
from gouache.layouts.adapters import bundled, split_names
from gouache.layouts.modules import Module

NEAREST = 20  # for so many unmatched names the nearest known one is looked for, which takes a while each

WRONG = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
"""What torch raises for tensors whose shapes do not go together."""

_NUMBERS = ("alpha", "scale", "scalar", "on_input")  # which have values, not shapes
_PLAIN = ("lora_up.weight", "lora_down.weight")


@dataclass(frozen=True)
class Adapter:
    """The patches of a file. `tensors[module][part]` is the file's name of that part; `shares` as in `Patch`.

    `unmatched`: names without a module -> the nearest, "" where none is near. `embeddings`: those packed along, as
    {placeholder: the file's names}.
    """

    file: ModelFile
    tensors: Mapping[Module, Mapping[str, str]]
    shares: Mapping[Module, tuple[int, int]]
    unmatched: Mapping[str, str]
    embeddings: Mapping[str, list[str]]
    stems: Mapping[Module, str] = field(repr=False)
    scales: Scales = field(repr=False)

    def patch(self, module: Module, device: torch.device | str = "cpu") -> Patch:
        """What the file does to `module`; read now, in float32. Raises ModelError for parts that are damaged."""
        names = self.tensors[module]
        parts: dict[str, Tensor] = {}
        for part, name in names.items():
            tensor = self._number(name) if part in _NUMBERS else self.file.tensor(name).to(device).float()
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"{self._where(name)} holds NaN or infinite numbers, so the file is damaged")
            parts[part] = tensor
        return Patch({**self.scales.of(self.stems[module], parts), **parts}, self.shares[module])

    def sketch(self, module: Module) -> Patch:
        """The same without values, on the meta device: what shapes it has, and whether they fit each other."""
        names = self.tensors[module]
        parts = {part: torch.empty(self.file.tensors[name].shape, device="meta")
                 for part, name in names.items() if part not in _NUMBERS}  # fmt: skip
        if "on_input" in names:  # which tells the side that the others are for
            parts["on_input"] = self._number(names["on_input"])
        return Patch(parts, self.shares[module])

    def misfit(self, module: Module, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Why the patch does not fit a module of these shapes ({"weight": ..., "bias": ...}), told from the headers."""
        if "weight" not in shapes:
            return "the module has no weight"
        if (plain := self._plain_misfit(module, shapes["weight"])) is not None:
            return plain
        try:
            sketch = self.sketch(module)
            if "bias" not in shapes and set(sketch.parts) == {"diff_b"}:
                return "the module has no bias"
            # How large a delta of a few values is, those values tell, once they are read.
            told = {part: tensor for part, tensor in sketch.parts.items() if not part.startswith("bias_")}
            if told:
                sketch = Patch(told, sketch.share)
                sketch.weight(torch.empty(shapes["weight"], device="meta"), 1.0)
                if "bias" in shapes:
                    sketch.bias(torch.empty(shapes["bias"], device="meta"), 1.0)
        except ModelError as error:
            return str(error)
        except WRONG:
            return "its parts do not fit each other"
        return ""

    def _plain_misfit(self, module: Module, weight: tuple[int, ...]) -> str | None:
        """The same for a LoRA of two factors, of which a file has a thousand; None for anything else."""
        names = self.tensors[module]
        if not set(_PLAIN) <= names.keys() <= {*_PLAIN, "alpha"}:
            return None
        up, down = (self.file.tensors[names[part]].shape for part in _PLAIN)
        if len(up) < 2 or len(down) < 2 or up[1] != down[0] or math.prod(up[2:]) != 1 or not math.prod(down):
            return "its parts do not fit each other"
        rows, count = up[0], self.shares[module][1]
        if len(weight) < 2 or (rows, math.prod(down[1:])) != (weight[0] * count, math.prod(weight[1:])):
            return f"it makes {[rows, *down[1:]]}, the weight is {list(weight)}" + (f", {count} times" * (count > 1))
        return ""

    def _number(self, name: str) -> Tensor:
        if self.file.tensors[name].elements != 1:
            raise ModelError(f"{self._where(name)} is {list(self.file.tensors[name].shape)}, expected one number")
        return self.file.tensor(name).float()

    def _where(self, name: str) -> str:
        return f"{printable(str(self.file.path))}: {printable(name)}"


def read_lora(file: ModelFile, names: Mapping[str, tuple[Module, ...]]) -> Adapter:
    """The patches in `file` for a model whose modules are called `names` (`layouts.modules.module_names`)."""
    tensors: dict[Module, dict[str, str]] = {}
    shares: dict[Module, tuple[int, int]] = {}
    stems: dict[Module, str] = {}
    unmatched: dict[str, str] = {}
    split = split_names(file)
    packed = bundled(file)
    inside = {name for group in packed.values() for name in group}
    for name in file:
        if name in inside:
            continue
        stem, suffix = split.get(name, (name, ""))
        modules = names.get(stem, ())
        if not suffix or not modules:
            near = difflib.get_close_matches(stem, names, n=1) if len(unmatched) < NEAREST else []
            unmatched[name] = near[0] if near else ""
            continue
        if other := next((stems[module] for module in modules if stems.get(module, stem) != stem), None):
            unmatched[name] = other  # the file names the module twice, of which the first counts
            continue
        part = suffix.lstrip("._")  # what joins it to the module
        for index, module in enumerate(modules):
            tensors.setdefault(module, {})[SAME.get(part, part)] = name
            shares[module], stems[module] = (index, len(modules)), stem
    for module, parts in tensors.items():
        for part in Patch(dict.fromkeys(parts, torch.empty(0))).unused:
            unmatched[parts.pop(part)] = f"{stems[module]}, which has another form already"
    return Adapter(file, tensors, shares, unmatched, packed, stems, scales(file))

"""An adapter file -> patches by module, and what of it found no module: counted, nothing passed over in silence."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from gouache.adapters.config import Scales, scales
from gouache.adapters.patch import SAME, Patch
from gouache.errors import ModelError, printable
from gouache.files.record import ModelFile
from gouache.layouts.adapters import bundled, split_names
from gouache.layouts.modules import Module

NEAREST = 20  # for so many unmatched names the nearest known one is looked for, which takes a while each


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
        """What the file does to `module`; read now, in float32."""
        names = self.tensors[module]
        parts = {part: self.file.tensor(name).to(device).float() for part, name in names.items()}
        for part, tensor in parts.items():
            if part in _NUMBERS and tensor.numel() != 1:
                raise ModelError(
                    f"{self.file.path}: {printable(names[part])} is {list(tensor.shape)}, expected one number"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"{self.file.path} is damaged: {printable(names[part])} holds NaN or infinite numbers")
        return Patch({**self.scales.of(self.stems[module], parts), **parts}, self.shares[module])

    def sketch(self, module: Module) -> Patch:
        """The same without values, on the meta device: what shapes it has, and whether they fit each other."""
        parts = {part: torch.empty(self.file.tensors[name].shape, device="meta")
                 for part, name in self.tensors[module].items() if part not in _NUMBERS}  # fmt: skip
        return Patch(parts, self.shares[module])

    def misfit(self, module: Module, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Why the patch does not fit a module of these shapes ({"weight": ..., "bias": ...}), told from the headers."""
        if (plain := self._plain_misfit(module, shapes)) is not None:
            return plain
        sketch = self.sketch(module)
        if "bias_values" in sketch.parts:
            return ""  # how large that is, its values tell
        if "weight" not in shapes:
            return "the module has no weight"
        if "bias" not in shapes and set(sketch.parts) == {"diff_b"}:
            return "the module has no bias"
        try:
            sketch.weight(torch.empty(shapes["weight"], device="meta"), 1.0)
            if "bias" in shapes:
                sketch.bias(torch.empty(shapes["bias"], device="meta"), 1.0)
        except (ModelError, RuntimeError, IndexError) as error:
            return str(error) if isinstance(error, ModelError) else "its parts do not fit each other"
        return ""

    def _plain_misfit(self, module: Module, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """The same for a LoRA of two factors, of which a file has a thousand; None for anything else."""
        names = self.tensors[module]
        if (
            not {"lora_up.weight", "lora_down.weight"}
            <= names.keys()
            <= {"lora_up.weight", "lora_down.weight", "alpha"}
        ):
            return None
        up, down = (self.file.tensors[names[f"lora_{side}.weight"]].shape for side in ("up", "down"))
        rows = math.prod(up[:1]) // self.shares[module][1]
        wanted = shapes.get("weight", ())
        if up[1:2] != down[:1] or math.prod(up) != math.prod(up[:2]) or not math.prod(down):
            return "its parts do not fit each other"
        if not wanted or (rows, math.prod(down[1:])) != (wanted[0], math.prod(wanted[1:])):
            return f"it makes {[rows, *down[1:]]}, the weight is {list(wanted)}"
        return ""


_NUMBERS = ("alpha", "scale", "scalar", "on_input")  # which have values, not shapes


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
        part = suffix.lstrip("._")  # what joins it to the module
        for index, module in enumerate(modules):
            tensors.setdefault(module, {})[SAME.get(part, part)] = name
            shares[module], stems[module] = (index, len(modules)), stem
    return Adapter(file, tensors, shares, unmatched, packed, stems, scales(file))

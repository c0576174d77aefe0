"""An adapter file -> patches by module, and the tensors that match no module: counted, never ignored silently."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gouache.adapters import forms
from gouache.adapters.config import Scales, scales
from gouache.adapters.patch import LATENT_CHANNELS, PART_ALIASES, Patch
from gouache.errors import ModelError, printable
from gouache.files.record import ModelFile
from gouache.layouts.adapters import bundled, split_names
from gouache.layouts.modules import Module
from gouache.layouts.nearest import nearest

NEAREST = 20  # unmatched names for which the nearest known one is searched

SHAPE_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
"""What torch raises for tensors whose shapes do not fit each other."""

_NUMBERS = ("alpha", "scale", "scalar", "on_input")  # single values
_PLAIN = ("lora_up.weight", "lora_down.weight")


@dataclass(frozen=True)
class AdapterFile:
    """The patches of a file. `tensors[module][part]` is the tensor name of that part; `shares` as in `Patch`.

    `unmatched` maps names without a module to the nearest known one, "" where none is near. `embeddings` maps the
    placeholder of each bundled embedding to its tensor names.
    """

    file: ModelFile
    tensors: Mapping[Module, Mapping[str, str]]
    shares: Mapping[Module, tuple[int, int]]
    unmatched: Mapping[str, str]
    embeddings: Mapping[str, list[str]]
    stems: Mapping[Module, str] = field(repr=False)
    scales: Scales = field(repr=False)

    @property
    def name(self) -> str:
        return str(self.file.path)

    @property
    def target_modules(self) -> Collection[Module]:
        return self.tensors.keys()

    def patch(self, module: Module, device: torch.device | str = "cpu") -> Patch:
        """The patch for `module`, read now, in float32. Raises ModelError for parts that are damaged."""
        names = self.tensors[module]
        parts: dict[str, Tensor] = {}
        for part, name in names.items():
            tensor = self._number(name) if part in _NUMBERS else self.file.tensor(name).to(device).float()
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"{self._where(name)} holds NaN or infinite numbers, so the file is damaged")
            parts[part] = tensor
        try:
            parts = {**self.scales.of(self.stems[module], parts), **parts}
        except ModelError as error:
            raise ModelError(f"{printable(str(self.file.path))}: {error}") from None
        return Patch(_with_bias(parts), self.shares[module])

    def sketch(self, module: Module) -> Patch:
        """The patch without values, on the meta device: enough to check shapes."""
        names = self.tensors[module]
        parts = {part: torch.empty(self.file.tensors[name].shape, device="meta")
                 for part, name in names.items() if part not in _NUMBERS}  # fmt: skip
        if "on_input" in names:  # its value decides which side the other parts act on
            parts["on_input"] = self._number(names["on_input"])
        return Patch(_with_bias(parts), self.shares[module])

    def mismatch(self, module: Module, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Why the patch does not fit a module of these shapes ({"weight": ..., "bias": ...}), by the header alone."""
        if "weight" not in shapes:
            return "the module has no weight"
        if (plain := self._plain_mismatch(module, shapes["weight"])) is not None:
            return plain
        try:
            sketch = self.sketch(module)
            if "bias" not in shapes and ("lora_up.bias" in self.tensors[module] or set(sketch.parts) == {"diff_b"}):
                return "it changes the bias, and the module has none"
            # The shape of a sparse difference depends on its values, which are not read here.
            dense = {part: tensor for part, tensor in sketch.parts.items() if not part.startswith("bias_")}
            if dense:
                sketch = Patch(dense, sketch.share)
                sketch.weight(torch.empty(shapes["weight"], device="meta"), 1.0)
                if "bias" in shapes:
                    sketch.bias(torch.empty(shapes["bias"], device="meta"), 1.0)
        except ModelError as error:
            return str(error)
        except SHAPE_ERRORS:
            return "its parts do not fit each other"
        return ""

    def _plain_mismatch(self, module: Module, weight: tuple[int, ...]) -> str | None:
        """The same for a LoRA of two factors, quickly because files hold a thousand; None for other forms."""
        names = self.tensors[module]
        if not set(_PLAIN) <= names.keys() <= {*_PLAIN, "alpha"}:
            return None
        up, down = (self.file.tensors[names[part]].shape for part in _PLAIN)
        if len(up) < 2 or len(down) < 2 or up[1] != down[0] or math.prod(up[2:]) != 1 or not math.prod(down):
            return "its parts do not fit each other"
        rows, count = up[0], self.shares[module][1]
        first = len(weight) == len(down) == 4 and down[1] == LATENT_CHANNELS < weight[1]
        if first:
            return None
        if len(weight) < 2 or (rows, math.prod(down[1:])) != (weight[0] * count, math.prod(weight[1:])):
            return f"it changes a weight of {[rows, *down[1:]]}, the weight is {list(weight)}" + (
                f", {count} times" * (count > 1)
            )
        return ""

    def _number(self, name: str) -> Tensor:
        if self.file.tensors[name].elements != 1:
            raise ModelError(f"{self._where(name)} is {list(self.file.tensors[name].shape)}, expected one number")
        return self.file.tensor(name).float()

    def _where(self, name: str) -> str:
        return f"{printable(str(self.file.path))}: {printable(name)}"


def _with_bias(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """`parts` with the bias of a LoRA, scaled like its product, as the change of the module's bias."""
    if "lora_up.bias" not in parts:
        return parts
    parts = dict(parts)
    bias = parts.pop("lora_up.bias")
    if bias.is_meta:
        return {**parts, "diff_b": parts.get("diff_b", bias)}
    rank = parts["lora_down.weight"].shape[0] if "lora_down.weight" in parts else 0
    return {**parts, "diff_b": parts.get("diff_b", 0) + forms.scale(parts, rank) * bias}


def read_lora(file: ModelFile, names: Mapping[str, tuple[Module, ...]]) -> AdapterFile:
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
            unmatched[name] = nearest(stem, names) if len(unmatched) < NEAREST else ""
            continue
        if other := next((stems[module] for module in modules if stems.get(module, stem) != stem), None):
            unmatched[name] = other  # the file names the module twice; the first one is used
            continue
        part = suffix.lstrip("._")
        for index, module in enumerate(modules):
            tensors.setdefault(module, {})[PART_ALIASES.get(part, part)] = name
            shares[module], stems[module] = (index, len(modules)), stem
    for module, parts in tensors.items():
        for part in Patch(dict.fromkeys(parts, torch.empty(0))).unused:
            unmatched[parts.pop(part)] = f"{stems[module]}, which has another form already"
    return AdapterFile(file, tensors, shares, unmatched, packed, stems, scales(file))

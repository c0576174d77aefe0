"""Bake LoRAs into a model: add their differences to its weights permanently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from gouache.adapters.read import AdapterFile, read_lora
from gouache.errors import ModelError, printable
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.layouts.modules import Module, module_names
from gouache.workshop import derive, layout, save
from gouache.workshop.lora.write import specs_of
from gouache.workshop.modelspec import describe
from gouache.workshop.progress import OnWork


def bake(
    model: Path,
    loras: Sequence[tuple[Path, float]],
    target: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    on_work: OnWork | None = None,
) -> dict[str, tuple[int, int]]:
    """Write `model` with `loras` ((file, strength), ...) added to its weights.

    Returns {LoRA file: (modules changed, unmatched names)}. Raises ModelError, and writes nothing, if no module of a
    LoRA is in the model, or if shapes do not fit.
    """
    form = save.single_form_of(target)
    save.check_target(target, overwrite)
    base, found = layout.opened(model)
    for name, reason in found.unusable.items():
        if name != "vae":
            raise ModelError(f"{save.shown(model)} has no usable {name} ({reason})")
    names = module_names(specs_of(found))
    adapters = [(_read(path, names, found), strength) for path, strength in loras]
    family = found.family.value
    parts = []
    used = set[str]()
    for name, part in found.components.items():
        inner = derive.arrange(base, part.origins)
        _check_fit(inner, name, adapters)
        parts.append(layout.as_in(part, _patched(inner, name, adapters), family))
        used |= {source for origin in part.origins.values() for source in origin.sources}
    result = derive.join(derive.keep(base, (name for name in base if name not in used)), *parts)
    result = derive.cast(result, dtype)
    baked = ", ".join(f"{path.name}:{strength:g}" for path, strength in loras)
    metadata = save.without_hashes({**describe(found), **base.metadata, "gouache.loras": baked})
    result = replace(result, metadata=metadata)
    save.write_file(result, target, form, on_work, what="baking", overwrite=overwrite)
    return {
        str(path): (len(adapter.tensors), len(adapter.unmatched)) for (path, _), (adapter, _) in zip(loras, adapters)
    }


def _patched(part: ModelFile, component: str, adapters: Sequence[tuple[AdapterFile, float]]) -> ModelFile:
    """`part`, which has the network's names, with the adapters applied."""

    def read(name: str) -> Tensor:
        tensor = part.read(name)
        stem, _, leaf = name.rpartition(".")
        changed = tensor
        for adapter, strength in adapters:
            if (component, stem) in adapter.tensors and leaf in ("weight", "bias"):
                patch = adapter.patch((component, stem))
                try:
                    changed = patch.weight(changed, strength) if leaf == "weight" else patch.bias(changed, strength)
                except ModelError as error:
                    raise ModelError(
                        f"{save.shown(adapter.file.path)} does not fit {component} {stem}: {error}"
                    ) from None
        return changed.to(tensor.dtype)

    return derive.make(part, part.tensors, read)


def _check_fit(part: ModelFile, component: str, adapters: Sequence[tuple[AdapterFile, float]]) -> None:
    """ModelError for shapes that do not fit, from the headers alone, before any tensor is read."""
    for adapter, _ in adapters:
        for module in adapter.tensors:
            if module[0] != component:
                continue
            shapes = {
                leaf: part.tensors[name].shape for leaf in ("weight", "bias") if (name := f"{module[1]}.{leaf}") in part
            }
            if why := adapter.mismatch(module, shapes):
                raise ModelError(f"{save.shown(adapter.file.path)} does not fit {component} {module[1]}: {why}")


def _read(path: Path, names: Mapping[str, tuple[Module, ...]], found: Found) -> AdapterFile:
    file = open_model(path)
    adapter = read_lora(file, names)
    if not adapter.tensors:
        lora = identify(file)
        family = lora.family.value
        kind = lora.kind.value + (f", for {family.title}" if family is not None else "")
        raise ModelError(f"{printable(str(path))} matches no module of {printable(found.path.name)} (kind: {kind})")
    return adapter

"""LoRAs out of LoRAs: other ranks, several in one, other names. Whichever model they are for does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gouache.adapters.patch import SAME, Patch
from gouache.adapters.read import read_lora
from gouache.errors import ModelError, RequestError, printable
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.layouts.adapters import split_names
from gouache.layouts.modules import Module, module_names
from gouache.nn.spec import TextSpec, UNetSpec
from gouache.workshop.convert import OnWork
from gouache.workshop.lora.factors import Size, factors
from gouache.workshop.lora.write import Factors, Made, check_target, write, write_stems


def resize(
    source: Path,
    target: Path,
    size: Size,
    *,
    dtype: str = "fp16",
    overwrite: bool = False,
    on_work: OnWork | None = None,
) -> Made:
    """Write the LoRA `source` with other ranks: the strongest directions of each module. Any format goes in."""
    return _combined([(source, 1.0)], target, size, dtype, overwrite, on_work, "resized from")


def merge(
    loras: Sequence[tuple[Path, float]],
    target: Path,
    size: Size | None = None,
    *,
    dtype: str = "fp16",
    overwrite: bool = False,
    on_work: OnWork | None = None,
) -> Made:
    """Several LoRAs as one: by concatenation, which is exact, or, given a `size`, by the SVD of their sum."""
    if len(loras) < 2:
        raise RequestError("loras", "name at least two to merge")
    if size is not None:
        return _combined(loras, target, size, dtype, overwrite, on_work, "merged by SVD from")
    check_target(target, dtype, "kohya", overwrite)
    files = [open_model(path) for path, _ in loras]
    stacked: dict[str, list[Factors]] = {}
    for file, (path, strength) in zip(files, loras):
        for stem, parts in _by_stem(file).items():
            if not {"lora_up.weight", "lora_down.weight"} <= parts.keys() or "lora_mid.weight" in parts:
                raise ModelError(f"{path}: {printable(stem)} is no plain LoRA; give a rank to merge it by SVD")
            up, down = parts["lora_up.weight"], parts["lora_down.weight"]
            alpha = float(parts["alpha"]) if "alpha" in parts else 0.0
            scale = strength * (alpha / down.shape[0] if alpha else 1.0)
            stacked.setdefault(stem, []).append((up.flatten(1) * scale, down))
    parts = {}
    for stem, pairs in stacked.items():
        shapes = {(up.shape[0], *down.shape[1:]) for up, down in pairs}
        if len(shapes) > 1:
            raise ModelError(f"{printable(stem)} has two shapes in these files: they are for different models")
        parts[stem] = (torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs]))
    return write_stems(parts, files[0].metadata, target, dtype, f"merged from {_named(loras)}", 1.0)


def _combined(
    loras: Sequence[tuple[Path, float]],
    target: Path,
    size: Size,
    dtype: str,
    overwrite: bool,
    on_work: OnWork | None,
    how: str,
) -> Made:
    """The sum of LoRAs of any form, module by module, factored anew."""
    check_target(target, dtype, "kohya", overwrite)
    files = [open_model(path) for path, _ in loras]
    stems = [_by_stem_names(file) for file in files]
    every = sorted({stem for named in stems for stem in named})
    if not every:
        raise ModelError(f"{loras[0][0]} is no LoRA: none of its names is one of a LoRA's")
    parts: dict[str, Factors] = {}
    held = total = 0.0
    for number, stem in enumerate(every):
        delta: Tensor | None = None
        for file, named, (path, strength) in zip(files, stems, loras):
            if stem not in named:
                continue
            patch = Patch({part: file.tensor(name).float() for part, name in named[stem].items()})
            own = strength * _whole(patch, path, stem)
            if delta is not None and delta.shape != own.shape:
                raise ModelError(f"{printable(stem)} has two shapes in these files: they are for different models")
            delta = own if delta is None else delta + own
        assert delta is not None
        rank = size.of(delta)
        if rank and bool(delta.any()):
            up, down, some, all_of_it = factors(delta, rank, size)
            parts[stem] = (up, down)
            held, total = held + some, total + all_of_it
        if on_work is not None:
            on_work("factoring", number + 1, len(every))
    share = held / total if total else 1.0
    return write_stems(parts, files[0].metadata, target, dtype, f"{how} {_named(loras)}", share)


def _whole(patch: Patch, path: Path, stem: str) -> Tensor:
    """The difference that a patch makes, where its weight is not at hand."""
    if {"dora_scale", "dora_rows"} & set(patch.parts):
        raise ModelError(f"{path}: {printable(stem)} is a DoRA, which is no difference by itself; bake it into a model")
    delta = patch.delta()
    if delta is None and patch.form is not None:
        raise ModelError(
            f"{path}: {printable(stem)} is {patch.form}, which is no difference by itself; bake it into a model"
        )
    if delta is None:
        raise ModelError(f"{path}: {printable(stem)} changes a bias, which no LoRA can")
    return delta


def rename(
    source: Path,
    target: Path,
    naming: str,
    family: str | None = None,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Made:
    """The LoRA `source` under kohya's or PEFT's names. `family` says for which models, where the file does not."""
    check_target(target, dtype or "fp16", naming, overwrite)
    file = open_model(source)
    found = identify(file, family=family)
    line = found.family.value
    if line is None:
        raise ModelError(f"{source}: for which models it is cannot be told ({found.family.evidence}); say --family")
    specs = {place.component: place.spec for place in line.places if isinstance(place.spec, UNetSpec | TextSpec)}
    adapter = read_lora(file, module_names(specs))
    if not adapter.tensors or adapter.unmatched:
        odd = next(iter(adapter.unmatched), "none of its names")
        raise ModelError(f"{source}: {printable(odd)} is no module of {line.title} that could be renamed")
    parts: dict[Module, Factors] = {}
    for module, named in adapter.tensors.items():
        pair = adapter.patch(module).factors
        if pair is None or not named.keys() <= {"lora_up.weight", "lora_down.weight", "alpha"}:
            raise ModelError(f"{source}: {'.'.join(module)} is no plain LoRA; PEFT and kohya share that form alone")
        parts[module] = pair
    return write(parts, specs, found, target, dtype or "fp16", naming, dict(file.metadata), 1.0, {})


def _by_stem_names(file: ModelFile) -> dict[str, dict[str, str]]:
    """{what stands before the suffix: {part: name}}, whichever model the names are for."""
    found: dict[str, dict[str, str]] = {}
    for name, (stem, suffix) in split_names(file).items():
        part = suffix.lstrip("._")
        found.setdefault(stem, {})[SAME.get(part, part)] = name
    return found


def _by_stem(file: ModelFile) -> dict[str, dict[str, Tensor]]:
    return {
        stem: {part: file.tensor(name).float() for part, name in parts.items()}
        for stem, parts in _by_stem_names(file).items()
    }


def _named(loras: Sequence[tuple[Path, float]]) -> str:
    return ", ".join(path.stem if strength == 1 else f"{path.stem}:{strength:g}" for path, strength in loras)

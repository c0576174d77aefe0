"""Resize, merge and rename LoRAs. All but renaming works without knowing which model they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gouache.adapters.patch import PART_ALIASES, Patch
from gouache.adapters.read import read_lora
from gouache.errors import ModelError, RequestError, printable
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.layouts.adapters import split_names
from gouache.layouts.modules import Module, module_names
from gouache.nn.spec import TextSpec, UNetSpec
from gouache.workshop import save
from gouache.workshop.lora.factors import Size, factors, squared_norm
from gouache.workshop.lora.write import CONVOLUTIONS, Factors, Made, check_target, write, write_stems
from gouache.workshop.progress import OnWork


def resize(
    source: Path,
    target: Path,
    size: Size,
    *,
    dtype: str = "fp16",
    overwrite: bool = False,
    on_work: OnWork | None = None,
) -> Made:
    """Write the LoRA `source`, of any form, with lower ranks: the strongest directions of each module."""
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
    """Merge several LoRAs into one: by concatenation, which is exact, or, given a `size`, by an SVD of their sum."""
    if len(loras) < 2:
        raise RequestError("loras", "name at least two LoRAs to merge")
    if size is not None:
        return _combined(loras, target, size, dtype, overwrite, on_work, "merged by SVD from")
    check_target(target, dtype, "kohya", overwrite)
    files = [open_model(path) for path, _ in loras]
    stacked: dict[str, list[Factors]] = {}
    modules = [_by_stem(file) for file in files]
    _check_are_loras(loras, modules)
    for by_stem, (path, strength) in zip(modules, loras):
        for stem, parts in by_stem.items():
            if not {"lora_up.weight", "lora_down.weight"} <= parts.keys() or "lora_mid.weight" in parts:
                raise ModelError(
                    f"{save.shown(path)}: {printable(stem)} is not a plain LoRA; give --rank to merge it by SVD"
                )
            up, down = parts["lora_up.weight"], parts["lora_down.weight"]
            alpha = float(parts["alpha"]) if "alpha" in parts else 0.0
            scale = strength * (alpha / down.shape[0] if alpha else 1.0)
            stacked.setdefault(stem, []).append((up.flatten(1) * scale, down))
    parts = {}
    for stem, pairs in stacked.items():
        shapes = {(up.shape[0], *down.shape[1:]) for up, down in pairs}
        if len(shapes) > 1:
            raise ModelError(f"{printable(stem)} has different shapes in these files: they are for different models")
        parts[stem] = (torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs]))
    comment = f"merged from {_listed(loras)}"
    return write_stems(parts, files[0].metadata, target, dtype, comment, 1.0, overwrite=overwrite)


def _combined(
    loras: Sequence[tuple[Path, float]],
    target: Path,
    size: Size,
    dtype: str,
    overwrite: bool,
    on_work: OnWork | None,
    origin: str,
) -> Made:
    """The sum of LoRAs of any form, factored module by module. `origin` is the first part of the file's comment."""
    check_target(target, dtype, "kohya", overwrite)
    files = [open_model(path) for path, _ in loras]
    stems = [_names_by_stem(file) for file in files]
    every = sorted({stem for names in stems for stem in names})
    _check_are_loras(loras, stems)
    parts: dict[str, Factors] = {}
    held = total = 0.0
    skipped = 0
    for number, stem in enumerate(every):
        delta: Tensor | None = None
        for file, names, (path, strength) in zip(files, stems, loras):
            if stem not in names:
                continue
            patch = Patch({part: file.tensor(name).float() for part, name in names[stem].items()})
            own = strength * _delta(patch, path, stem)
            if delta is not None and delta.shape != own.shape:
                raise ModelError(
                    f"{printable(stem)} has different shapes in these files: they are for different models"
                )
            delta = own if delta is None else delta + own
        assert delta is not None
        rank = size.of(delta)
        if rank and bool(delta.any()):
            up, down, module_held, module_total = factors(delta, rank, size)
            parts[stem] = (up, down)
            held, total = held + module_held, total + module_total
        elif bool(delta.any()):
            skipped += 1
            total += squared_norm(delta)
        if on_work is not None:
            on_work("factoring", number + 1, len(every))
    share = held / total if total else 1.0
    left_out = {CONVOLUTIONS: skipped} if skipped else {}
    comment = f"{origin} {_listed(loras)}"
    return write_stems(parts, files[0].metadata, target, dtype, comment, share, left_out, overwrite=overwrite)


def _check_are_loras(loras: Sequence[tuple[Path, float]], stems: Sequence[Mapping[str, object]]) -> None:
    for (path, _), names in zip(loras, stems):
        if not names:
            raise ModelError(f"{save.shown(path)} is not a LoRA: it has no tensor named like one of a LoRA")


def _delta(patch: Patch, path: Path, stem: str) -> Tensor:
    """The difference that a patch adds to its weight, computed without that weight."""
    if {"dora_scale", "dora_rows"} & set(patch.parts):
        raise ModelError(
            f"{save.shown(path)}: {printable(stem)} is a DoRA, whose difference depends on the model's weights; "
            "bake it into a model instead"
        )
    delta = patch.delta()
    if delta is None and patch.form is not None:
        raise ModelError(
            f"{save.shown(path)}: {printable(stem)} is {patch.form}, whose difference depends on the model's "
            "weights; bake it into a model instead"
        )
    if delta is None:
        raise ModelError(f"{save.shown(path)}: {printable(stem)} changes a bias, which a LoRA cannot do")
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
    """Write the LoRA `source` under kohya's or PEFT's names. `family` overrides the model family that is detected."""
    check_target(target, dtype or "fp16", naming, overwrite)
    file = open_model(source)
    found = identify(file, family=family)
    line = found.family.value
    if line is None:
        raise ModelError(f"{save.shown(source)}: model family {found.family.evidence}; give --family")
    specs = {place.component: _of_any_width(place.spec) for place in line.locations
             if isinstance(place.spec, UNetSpec | TextSpec)}  # fmt: skip
    adapter = read_lora(file, module_names(specs))
    if not adapter.tensors:
        raise ModelError(f"{save.shown(source)} cannot be renamed: none of its names is a module of {line.title}")
    if adapter.unmatched:
        name = next(iter(adapter.unmatched))
        one, other = save.shown(source), printable(name)
        raise ModelError(f"{one} cannot be renamed: {other} is not a module of {line.title}")
    parts: dict[Module, Factors] = {}
    for module, tensors in adapter.tensors.items():
        pair = adapter.patch(module).factors
        if pair is None or not tensors.keys() <= {"lora_up.weight", "lora_down.weight", "alpha"}:
            raise ModelError(
                f"{save.shown(source)}: {'.'.join(module)} is not a plain LoRA, the only form that kohya and PEFT have "
                "in common"
            )
        parts[module] = pair
    return write(
        parts, specs, found, target, dtype or "fp16", naming, dict(file.metadata), 1.0, {}, overwrite=overwrite
    )


def _of_any_width(spec: UNetSpec | TextSpec) -> UNetSpec | TextSpec:
    """`spec` with every module that a model of its family can have, whatever the widths of its levels: a residual block
    has a shortcut where the width changes."""
    if not isinstance(spec, UNetSpec):
        return spec
    return replace(spec, channel_mult=tuple(range(2, 2 + len(spec.channel_mult))))


def _names_by_stem(file: ModelFile) -> dict[str, dict[str, str]]:
    """{name without its suffix: {part: full name}}, for a LoRA of any model."""
    found: dict[str, dict[str, str]] = {}
    for name, (stem, suffix) in split_names(file).items():
        part = suffix.lstrip("._")
        found.setdefault(stem, {})[PART_ALIASES.get(part, part)] = name
    return found


def _by_stem(file: ModelFile) -> dict[str, dict[str, Tensor]]:
    return {
        stem: {part: file.tensor(name).float() for part, name in parts.items()}
        for stem, parts in _names_by_stem(file).items()
    }


def _listed(loras: Sequence[tuple[Path, float]]) -> str:
    return ", ".join(path.stem if strength == 1 else f"{path.stem}:{strength:g}" for path, strength in loras)

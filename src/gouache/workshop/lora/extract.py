"""From two models, what one has over the other, as a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gouache.errors import ModelError, printable
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.layouts.modules import Module
from gouache.workshop import derive
from gouache.workshop.convert import OnWork
from gouache.workshop.lora.factors import Size, factors
from gouache.workshop.lora.write import Factors, Made, check_target, specs_of, write

_STILL = 1e-7  # a difference smaller than this, relatively, is rounding


def extract(
    tuned: Path,
    base: Path,
    target: Path,
    size: Size,
    *,
    dtype: str = "fp16",
    naming: str = "kohya",
    text: bool = True,
    overwrite: bool = False,
    on_work: OnWork | None = None,
) -> Made:
    """What `tuned` has over `base`, as a LoRA: of each module's difference its strongest directions.

    Raises ModelError for models of two families, or that do not differ.
    """
    check_target(target, dtype, naming, overwrite)
    new, old = _sides(tuned), _sides(base)
    if new.found.family.value is not old.found.family.value:
        raise ModelError(f"{tuned} and {base} are of two families: there is no difference between them")
    specs = specs_of(new.found)
    parts: dict[Module, Factors] = {}
    sums = [0.0, 0.0]
    names = [(component, name) for component in specs for name in new.parts[component] if _learns(component, name)]
    names = [(component, name) for component, name in names if text or component == "unet"]
    done, small = 0, 0
    for component, name in names:
        sides = [side.parts[component] for side in (new, old) if component in side.parts]
        infos = [side.tensors.get(name) for side in sides]
        if len(infos) < 2 or infos[1] is None or infos[0] is None or infos[0].shape != infos[1].shape:
            small += 1
            continue
        a, b = (side.read(name).float() for side in sides)
        delta = a - b
        rank = size.of(delta)
        if rank and delta.norm() > _STILL * b.norm():
            up, down, held, total = factors(delta, rank, size)
            parts[component, name.removesuffix(".weight")] = (up, down)
            sums[0] += held
            sums[1] += total
        else:
            small += 1
        done += 1
        if on_work is not None:
            on_work("extracting", done, len(names))
    if not parts:
        raise ModelError(f"{tuned} does not differ from {base} in any weight that a LoRA of these ranks can change")
    said = {"ss_training_comment": f"extracted from {tuned.stem} over {base.stem}"}
    return write(parts, specs, new.found, target, dtype, naming, said, sums[0] / sums[1], {"unchanged": small})


@dataclass(frozen=True)
class _Side:
    found: Found
    parts: Mapping[str, ModelFile]


def _sides(path: Path) -> _Side:
    file = open_model(path)
    found = identify(file)
    if "unet" not in found.components:
        raise ModelError(f"{printable(str(path))} is {found.kind.value}, not a model with a U-Net")
    parts = {name: derive.arrange(file, part.origins) for name, part in found.components.items()}
    return _Side(found, parts)


def _learns(component: str, name: str) -> bool:
    """Whether adapters change this tensor: matrices and filters of the blocks, not the first and last layers."""
    if not name.endswith(".weight") or "norm" in name or name.endswith((".in_layers.0.weight", ".out_layers.0.weight")):
        return False
    if component == "unet":
        return not name.startswith(("time_embed.", "label_emb.", "input_blocks.0.", "out."))
    return ".self_attn." in name or ".mlp." in name

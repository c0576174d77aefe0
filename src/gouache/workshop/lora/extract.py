"""Extract the difference of two models as a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gouache.errors import ModelError, printable
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.record import ModelFile
from gouache.layouts.modules import Module
from gouache.workshop import derive, layout, save
from gouache.workshop.lora.factors import Size, factors, squared_norm
from gouache.workshop.lora.write import CONVOLUTIONS, UNCHANGED, UNPAIRED, Factors, Made, check_target, specs_of, write
from gouache.workshop.progress import OnWork

_ROUNDING = 1e-7  # a relative difference smaller than this counts as unchanged


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
    """Write the difference of `tuned` and `base` as a LoRA: the strongest directions of each module's difference.

    `text` includes the text encoders. `Made.held` is the share of the whole squared difference of the included
    networks, convolutions that `size` leaves out among them. Raises ModelError for models of different families, or
    for models that do not differ.
    """
    check_target(target, dtype, naming, overwrite)
    new, old = _sides(tuned), _sides(base)
    if new.found.family.value is not old.found.family.value:
        raise ModelError(
            f"{save.shown(tuned)} and {save.shown(base)} are models of different families; a LoRA needs two of the "
            "same family"
        )
    specs = specs_of(new.found)
    parts: dict[Module, Factors] = {}
    held = total = 0.0
    names = [
        (component, name) for component in specs for name in new.parts[component] if _is_adaptable(component, name)
    ]
    names = [(component, name) for component, name in names if text or component == "unet"]
    left_out = {CONVOLUTIONS: 0, UNPAIRED: 0, UNCHANGED: 0}
    done = 0
    for component, name in names:
        sides = [side.parts[component] for side in (new, old) if component in side.parts]
        infos = [side.tensors.get(name) for side in sides]
        if len(infos) < 2 or infos[1] is None or infos[0] is None or infos[0].shape != infos[1].shape:
            left_out[UNPAIRED] += 1
            continue
        a, b = (side.read(name).float() for side in sides)
        delta = a - b
        rank = size.of(delta)
        changed = bool(delta.norm() > _ROUNDING * b.norm())
        if changed and rank:
            up, down, module_held, module_total = factors(delta, rank, size)
            parts[component, name.removesuffix(".weight")] = (up, down)
            held += module_held
            total += module_total
        elif changed:
            left_out[CONVOLUTIONS] += 1
            total += squared_norm(delta)
        else:
            left_out[UNCHANGED] += 1
        done += 1
        if on_work is not None:
            on_work("extracting", done, len(names))
    if not parts:
        one, two = save.shown(tuned), save.shown(base)
        raise ModelError(f"{one} does not differ from {two} in any weight that a LoRA of these ranks can change")
    metadata = {"ss_training_comment": f"extracted from {tuned.stem} over {base.stem}"}
    return write(parts, specs, new.found, target, dtype, naming, metadata, held / total, left_out, overwrite=overwrite)


@dataclass(frozen=True)
class _Side:
    found: Found
    parts: Mapping[str, ModelFile]


def _sides(path: Path) -> _Side:
    file = layout.open_weights(path)
    found = identify(file)
    if "unet" not in found.components:
        raise ModelError(f"{printable(str(path))} is not a model with a complete U-Net (kind: {found.kind.value})")
    parts = {name: derive.arrange(file, part.origins) for name, part in found.components.items()}
    return _Side(found, parts)


def _is_adaptable(component: str, name: str) -> bool:
    """Whether LoRAs change this tensor: the matrices and convolution kernels of the blocks, not the first and last
    layers."""
    if not name.endswith(".weight") or "norm" in name or name.endswith((".in_layers.0.weight", ".out_layers.0.weight")):
        return False
    if component == "unet":
        return not name.startswith(("time_embed.", "label_emb.", "input_blocks.0.", "out."))
    return ".self_attn." in name or ".mlp." in name

"""Shrink a checkpoint to what inference or fine-tuning needs, like the released `pruned` (weights and EMA weights) and
`pruned-emaonly` files.

    open -> identify -> (EMA weights replace the weights) -> (drop components) -> (cast) -> write

Optimizer state, losses and tensors that no component has are always dropped; buffers that released files have are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from gouache.errors import ModelError, RequestError, printable
from gouache.families.found import Found
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.workshop import derive, layout, save
from gouache.workshop.modelspec import describe
from gouache.workshop.progress import OnWork, progress

Keep = Literal["ema", "last", "both"]
_DROPPABLE = {"vae": ("vae",), "text": ("text_encoder", "text_encoder_2")}
_JUNK = ("loss.", "first_stage_model.loss.", "safety_checker/")


@dataclass(frozen=True)
class Pruned:
    """`dropped`: {reason: (tensors, bytes)}. `kept` describes which weights the result holds. `cast_saved`: bytes saved
    by the cast to another dtype, negative if that dtype is wider. `notes` are those on reading the source.
    """

    tensors: int
    nbytes: int
    kept: str
    dropped: Mapping[str, tuple[int, int]]
    cast_saved: int = 0
    notes: tuple[str, ...] = ()

    @property
    def saved(self) -> int:
        """Bytes of tensors in the source less those in the result."""
        return sum(nbytes for _, nbytes in self.dropped.values()) + self.cast_saved


def prune(
    source: Path,
    target: Path,
    *,
    keep: str | None = None,
    dtype: str | None = None,
    drop: tuple[str, ...] = (),
    overwrite: bool = False,
    on_work: OnWork | None = None,
) -> Pruned:
    """Write `source`, pruned, as the .safetensors or .ckpt file `target`.

    `keep` "ema" replaces the weights with the EMA weights, "last" keeps only the weights, "both" keeps both under their
    own names; None means "ema" if the file has EMA weights, else "last". `drop` ("vae", "text") leaves components out.
    Raises RequestError for invalid settings, ModelError for a file that is not a checkpoint.
    """
    if keep is not None and keep not in get_args(Keep):
        raise RequestError("keep", f"{printable(keep, 40)!r} is not known; use ema, last or both")
    for part in drop:
        if part not in _DROPPABLE:
            raise RequestError("drop", f"{printable(part, 40)!r} is not known; use {' or '.join(_DROPPABLE)}")
    form = save.single_form_of(target)
    save.check_target(target, overwrite)
    file, found = layout.opened(source)
    trained = "unet" in found.components or ("vae" in found.components and "unet" not in found.unusable)
    if not trained or ("unet" not in found.components and not found.ema_names):
        reason = f"; U-Net: {found.missing['unet']}" if "unet" in found.missing else ""
        raise ModelError(
            f"{printable(str(source))} cannot be pruned because it has no complete U-Net (kind: {found.kind.value}"
            f"{reason})"
        )
    only = found.ema is not None and found.ema.value == "only"
    if only and keep not in (None, "ema"):
        name = printable(str(source))
        raise RequestError("keep", f"{name} has no weights but the EMA weights; use ema instead of {keep}")
    if keep == "ema" and not found.ema_names and not only:
        hint = found.ema.evidence if found.ema is not None else "no tensor is an EMA weight"
        raise RequestError("keep", f"{printable(str(source))} has no EMA weights ({hint}); use last instead of ema")
    chosen = keep or ("ema" if found.ema_names or only else "last")

    kept, dropped = pruned(file, found, chosen, drop)
    exempt = {name for name in kept if name in found.leftovers and len(kept.tensors[name].shape) < 2}
    result = derive.cast(kept, dtype, exempt)
    result = save.with_metadata(result, {**describe(found), **result.metadata})

    def check(path: Path) -> None:
        save.compare(open_model(path), result, progress("checking", result.nbytes, on_work))

    save.write_file(result, target, form, on_work, check, overwrite=overwrite)
    cast_saved = kept.nbytes - result.nbytes
    return Pruned(len(result), result.nbytes, _description(chosen, found), dropped, cast_saved, file.notes)


def pruned(
    file: ModelFile, found: Found, keep: str, drop: tuple[str, ...]
) -> tuple[ModelFile, dict[str, tuple[int, int]]]:
    """(`file` without what `keep` and `drop` leave out, {reason: (tensors, bytes) left out}); see `prune`."""
    reasons: dict[str, str] = dict.fromkeys(found.unknown, "not part of any component")
    reasons |= {name: found.leftovers[name] for name in found.leftovers if name.startswith(_JUNK)}
    for part in drop:
        for component in _DROPPABLE[part]:
            if component in found.components:
                sources = _sources(found, component)
                reasons |= dict.fromkeys(sources, f"the {component.replace('_', ' ')} (--drop)")
    averages = set(found.ema_names.values())
    replaced: dict[str, str] = {}
    if keep == "last":
        reasons |= dict.fromkeys(averages, "EMA weights")
    elif keep == "ema":
        replaced = _averages_by_weight(found)
        reasons |= dict.fromkeys(averages, "weights replaced by EMA weights")
    weights = _weights_of_averages(found)
    kept = {weights.get(name, name): replaced.get(name, name) for name in file if name not in reasons}
    result = derive.rename(file, kept)
    result = replace(result, extra={key: value for key, value in file.extra.items() if key in ("global_step", "epoch")})
    dropped: dict[str, tuple[int, int]] = {}
    for name, reason in reasons.items():
        count, nbytes = dropped.get(reason, (0, 0))
        dropped[reason] = (count + 1, nbytes + file.tensors[name].nbytes)
    if states := [value for key, value in file.extra.items() if key not in ("global_step", "epoch")]:
        tensors = [info for value in states for info in layout.tensors_in(value)]
        if tensors:
            dropped["training state: optimizers, schedules"] = (
                len(tensors), sum(info.nbytes for info in tensors)
            )  # fmt: skip
    return result, dropped


def _averages_by_weight(found: Found) -> dict[str, str]:
    """{name of a weight in the file: name of its EMA weight}."""
    trained = found.components["unet" if "unet" in found.components else "vae"]
    return {trained.origins[name].sources[0]: average for name, average in found.ema_names.items()}


def _weights_of_averages(found: Found) -> dict[str, str]:
    """{name of an EMA weight: name that the weight would have}, in a file without other weights of its U-Net."""
    part = found.components.get("unet")
    sources = {origin.sources[0]: name for name, origin in part.origins.items()} if part is not None else {}
    return {
        source: f"model.diffusion_model.{name}"
        for source, name in sources.items()
        if source.startswith(layout.AVERAGES)
    }


def _sources(found: Found, component: str) -> set[str]:
    return {source for origin in found.components[component].origins.values() for source in origin.sources}


def _description(keep: str, found: Found) -> str:
    if found.ema is not None and found.ema.value == "only":
        return "the EMA weights, which are the only ones, under the names of the weights (for painting)"
    if keep == "ema":
        return "the EMA weights, under the names of the weights (for painting)"
    if keep == "both":
        return "the weights and the EMA weights (for fine-tuning)"
    if found.ema is not None and found.ema.value == "counters":
        return "the weights, which are EMA weights already"
    return "the weights"

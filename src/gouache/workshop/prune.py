"""A checkpoint without what its use does not need: `pruned` (weights and their averages) or `pruned-emaonly`.

    open -> identify -> (averages in place of the weights) -> (components dropped) -> (another dtype) -> write

Optimizer states, losses and tensors that no part has are always left out; buffers that the released files carry stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from gouache.errors import ModelError, RequestError, printable
from gouache.families.found import Found
from gouache.files.open import open_model
from gouache.files.record import ModelFile, TensorInfo
from gouache.workshop import derive, layout, save
from gouache.workshop.convert import OnWork, progress
from gouache.workshop.modelspec import describe

Keep = Literal["ema", "last", "both"]
_DROPPABLE = {"vae": ("vae",), "text": ("text_encoder", "text_encoder_2")}
_JUNK = ("loss.", "first_stage_model.loss.", "safety_checker/")


@dataclass(frozen=True)
class Pruned:
    """`dropped`: {reason: (tensors, bytes)}. `kept` says whose weights the result holds, in words."""

    tensors: int
    nbytes: int
    kept: str
    dropped: Mapping[str, tuple[int, int]]

    @property
    def saved(self) -> int:
        """Bytes that the source held and the result does not, a narrower dtype's aside."""
        return sum(nbytes for _, nbytes in self.dropped.values())


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

    `keep` "ema" puts the averages in place of the weights, "last" keeps the weights alone, "both" keeps both under
    their own names; None is "ema" where there are averages. `drop` ("vae", "text") leaves components out. Raises
    RequestError where that cannot be, ModelError for a file that is no checkpoint.
    """
    if keep is not None and keep not in get_args(Keep):
        raise RequestError("keep", f"{keep!r} is not known; use ema, last or both")
    for part in drop:
        if part not in _DROPPABLE:
            raise RequestError("drop", f"{part!r} is not known; use {' or '.join(_DROPPABLE)}")
    form = save.single_form_of(target)
    save.refuse_existing(target, overwrite)
    file, found = layout.opened(source)
    if "unet" not in found.components and not found.ema_names:
        what = f"it is {found.kind.value}" + (f"; {found.missing['unet']}" if "unet" in found.missing else "")
        raise ModelError(f"{printable(str(source))} has no U-Net that could be pruned: {what}")
    if keep == "ema" and not found.ema_names:
        hint = found.ema.evidence if found.ema is not None else "nothing in it is an average"
        raise RequestError("keep", f"ema: {printable(str(source))} holds no averages ({hint}); use last")
    chosen = keep or ("ema" if found.ema_names else "last")

    result, dropped = _pruned(file, found, chosen, drop)
    exempt = {name for name in result if name in found.leftovers and len(result.tensors[name].shape) < 2}
    result = derive.cast(result, dtype, exempt)
    result = save.with_metadata(result, {**describe(found), **result.metadata})

    def check(path: Path) -> None:
        save.compare(open_model(path), result, progress("checking", result.nbytes, on_work))

    save.write_file(result, target, form, progress("writing", result.nbytes, on_work), check)
    return Pruned(len(result), result.nbytes, _words(chosen, found), dropped)


def _pruned(
    file: ModelFile, found: Found, keep: str, drop: tuple[str, ...]
) -> tuple[ModelFile, dict[str, tuple[int, int]]]:
    reasons: dict[str, str] = dict.fromkeys(found.unknown, "no part of a model has them")
    reasons |= {name: found.leftovers[name] for name in found.leftovers if name.startswith(_JUNK)}
    for part in drop:
        for component in _DROPPABLE[part]:
            if component in found.components:
                sources = _sources(found, component)
                reasons |= dict.fromkeys(sources, f"the {component.replace('_', ' ')}, as asked")
    averages = set(found.ema_names.values())
    swapped: dict[str, str] = {}
    if keep == "last":
        reasons |= dict.fromkeys(averages, "the averages (EMA)")
    elif keep == "ema":
        swapped = _plain_names(found)
        reasons |= dict.fromkeys(averages, "the weights that the averages took the place of")
    kept = {name: swapped.get(name, name) for name in file if name not in reasons}
    result = derive.rename(file, kept)
    result = replace(result, extra={key: value for key, value in file.extra.items() if key in ("global_step", "epoch")})
    dropped: dict[str, tuple[int, int]] = {}
    for name, reason in reasons.items():
        count, nbytes = dropped.get(reason, (0, 0))
        dropped[reason] = (count + 1, nbytes + file.tensors[name].nbytes)
    if states := [value for key, value in file.extra.items() if key not in ("global_step", "epoch")]:
        tensors = [info for value in states for info in _tensors_in(value)]
        if tensors:
            dropped["the state of the training: optimizers, schedules"] = (
                len(tensors), sum(info.nbytes for info in tensors)
            )  # fmt: skip
    return result, dropped


def _plain_names(found: Found) -> dict[str, str]:
    """{name of a weight in the file: name of its average}."""
    trained = found.components["unet" if "unet" in found.components else "vae"]
    return {trained.origins[name].sources[0]: average for name, average in found.ema_names.items()}


def _sources(found: Found, component: str) -> set[str]:
    return {source for origin in found.components[component].origins.values() for source in origin.sources}


def _tensors_in(value: object) -> list[TensorInfo]:
    """Every tensor that an unpickled value describes."""
    stack, found = [value], list[TensorInfo]()
    while stack:
        top = stack.pop()
        if isinstance(top, TensorInfo):
            found.append(top)
        elif isinstance(top, dict):
            stack += list(top.values())
        elif isinstance(top, list | tuple):
            stack += list(top)
    return found


def _words(keep: str, found: Found) -> str:
    if keep == "ema":
        return "the averages (EMA), under the names of the weights: for painting"
    if keep == "both":
        return "the weights and their averages (EMA): for fine-tuning"
    if found.ema is not None and found.ema.value == "counters":
        return "the weights, which are averages already"
    return "the weights"

"""Any readable file or folder -> a single file, a diffusers folder, or one component of it; a tensor at a time.

    open -> identify -> (another dtype) -> (one component, or another layout) -> write -> lead back, compare

Nothing of the source is run, the target appears whole or not at all, and before it does, what was written is taken
back to the source's names and compared with it, bit by bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gouache.errors import ModelError, RequestError, printable
from gouache.families.found import Component, Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.workshop import derive, layout, save, video
from gouache.workshop.modelspec import describe

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
OnWork = Callable[[str, int, int], None]
"""Told of progress: what is being done, how many bytes of how many."""


@dataclass(frozen=True)
class Converted:
    """What was written: `tensors`, `nbytes` of them, as which `form`.

    `kept_beside` and `left_out` count what has no place in the target by the reason why: the first stands in its
    `leftovers.safetensors`, the second is not there.
    """

    tensors: int
    nbytes: int
    form: str
    kept_beside: Mapping[str, int]
    left_out: Mapping[str, int]


def convert(
    source: Path,
    target: Path,
    *,
    to: str | None = None,
    dtype: str | None = None,
    only: str | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    on_work: OnWork | None = None,
) -> Converted:
    """Write `source` as `target`: a .safetensors or .ckpt file, or a diffusers folder, by its name or by `to`.

    `dtype` ("fp32", "bf16", "fp16", "fp8_e4m3") casts floating tensors. `only` ("unet", "vae", "text") writes that
    component alone, under its network's own names. `metadata` is added to the header. Raises FileError where the
    source cannot be read or the target not written, RequestError for settings that cannot be met, ModelError where
    the model does not allow it.
    """
    form = save.form_of(target, to)
    save.refuse_existing(target, overwrite)
    if dtype is not None and dtype not in derive.DTYPES:
        raise RequestError("dtype", f"{dtype!r} is not known; use {', '.join(derive.DTYPES)}")
    if metadata and form != "safetensors":
        raise RequestError("metadata", f"is kept in .safetensors files alone, and {target} is none")
    file = open_model(source)
    if not len(file):
        raise ModelError(f"{printable(str(source))} holds no tensors; there is nothing to convert")
    found = identify(file)
    # Buffers of the noise schedule and the like would only be damaged: nothing computes with them.
    exempt = {name for name in found.leftovers if len(file.tensors[name].shape) < 2}
    file = derive.cast(file, dtype, exempt)
    if only is not None:
        return _component(file, found, only, target, form, on_work)
    if form == "diffusers":
        return _to_folder(file, found, target, on_work)
    return _to_file(file, found, target, form, metadata or {}, on_work)


def _to_file(
    file: ModelFile, found: Found, target: Path, form: save.Form, more: Mapping[str, str], on_work: OnWork | None
) -> Converted:
    result, from_folder = file, found.kind.value == "diffusers folder"
    if from_folder:
        found = video.as_single(found)
        result = layout.single_file(file, found, layout.leftovers_of(file.path))
    numbers = {key: str(value) for key, value in file.extra.items() if isinstance(value, int | float | str)}
    result = save.with_metadata(result, {**numbers, **describe(found), **result.metadata, **more})

    def check(path: Path) -> None:
        written = open_model(path)
        save.compare(written, result, progress("checking", result.nbytes, on_work))
        if from_folder:
            for name, part in _as(found, written).components.items():
                source = derive.arrange(file, found.component(name).origins)
                # What came out of the leftovers is more than the folder holds.
                back = derive.keep(derive.arrange(written, part.origins), source)
                save.compare(back, source)

    save.write_file(result, target, form, progress("writing", result.nbytes, on_work), check)
    unplaced = [key for key in file.extra if key not in save.plain_values(file.extra)] if not from_folder else []
    left_out = Counter(f"tensors: {reason}" for reason in found.leftovers.values()) if from_folder else Counter[str]()
    if unplaced:
        left_out["values of the state of the training, which are no weights"] = len(unplaced)
    return Converted(len(result), result.nbytes, form, {}, left_out)


def _to_folder(file: ModelFile, found: Found, target: Path, on_work: OnWork | None) -> Converted:
    family = found.family.value
    if found.kind.value == "diffusers folder":
        laid = layout.Laid(file, derive.keep(replace(file, metadata={}), ()))
    else:
        laid = layout.folder(file, found)

    def check(path: Path) -> None:
        written = open_model(path)
        save.compare(written, laid.file, progress("checking", laid.file.nbytes, on_work))
        if laid.file is not file:
            save.compare(layout.single_file(written, _as(found, written), layout.leftovers_of(path)), file)

    total = laid.file.nbytes + laid.leftovers.nbytes
    tokenizers = family.text.encoders if family is not None and family.text is not None else ()
    save.write_folder(laid.file, target, tokenizers, laid.leftovers, progress("writing", total, on_work), check)
    unnamed = "it has no place in a diffusers folder"
    kept = Counter(found.leftovers.get(name, unnamed) for name in laid.leftovers)
    return Converted(len(laid.file), laid.file.nbytes, "diffusers", kept, {})


def _component(
    file: ModelFile, found: Found, only: str, target: Path, form: save.Form, on_work: OnWork | None
) -> Converted:
    part = found.component(_which(found, only))
    inner = derive.arrange(file, part.origins)
    result = replace(inner, metadata=describe(found, part.name), extra={})
    if form == "diffusers":
        result = layout.component_folder(file, part, found)

    def check(path: Path) -> None:
        save.compare(open_model(path), result, progress("checking", result.nbytes, on_work))

    writing = progress("writing", result.nbytes, on_work)
    if form == "diffusers":
        save.write_folder(result, target, on_bytes=writing, check=check)
    else:
        save.write_file(result, target, form, writing, check)
    return Converted(
        len(result), result.nbytes, form, {}, {"tensors that are no part of it": len(file) - len(_taken(part))}
    )


def _which(found: Found, only: str) -> str:
    texts = [name for name in found.components if name.startswith("text_encoder")]
    if only == "text" and len(texts) == 1:
        return texts[0]
    if only == "text" and len(texts) > 1:
        raise RequestError("only", f"text: there are two text encoders; say {' or '.join(texts)}")
    name = "text_encoder" if only == "text" else only
    if name not in COMPONENTS:
        raise RequestError("only", f"{only!r} is not known; use unet, vae or text")
    return name


def _taken(part: Component) -> set[str]:
    return {source for origin in part.origins.values() for source in origin.sources}


def _as(found: Found, file: ModelFile) -> Found:
    """What `file` is, told what the model that it was made of is: its names alone may say less."""
    family = found.family.value
    prediction = found.prediction.value if found.prediction is not None else None
    return identify(file, family=family.name if family is not None else None, prediction=prediction)


def progress(what: str, total: int, on_work: OnWork | None) -> Callable[[int], None] | None:
    """From the bytes of one tensor after the other to what `on_work` is told."""
    if on_work is None:
        return None
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_work(what, done, total)

    return on_bytes

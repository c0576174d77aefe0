"""Convert any readable file or folder to a single file, a diffusers folder, or one component; one tensor at a time.

    open -> identify -> (cast) -> (one component, or another layout) -> write -> convert back, compare

No code in the source is run. The target appears complete or not at all: before it gets its name, the written file is
converted back to the source's names and compared with the source, bit by bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gouache.errors import RequestError, printable
from gouache.families.found import Component, Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.workshop import derive, layout, save, video
from gouache.workshop.modelspec import describe
from gouache.workshop.progress import OnWork, progress

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Converted:
    """What was written: the number of `tensors`, their `nbytes`, and the `form` of the target.

    `leftovers` and `left_out` count, by reason, the tensors that the target's layout has no place for: the former are
    saved in its `leftovers.safetensors`, the latter are not saved. `rounded_to` is the dtype that values were rounded
    to, None where all values are exactly those of the source. `notes` are those on reading the source.
    """

    tensors: int
    nbytes: int
    form: str
    leftovers: Mapping[str, int]
    left_out: Mapping[str, int]
    rounded_to: str | None = None
    notes: tuple[str, ...] = ()


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
    """Write `source` as `target`: a .safetensors or .ckpt file, or a diffusers folder, by its extension or by `to`.

    `dtype` ("fp32", "bf16", "fp16", "fp8_e4m3") casts floating-point tensors. `only` ("unet", "vae", "text") writes
    that component alone, under the names of its network. `metadata` is added to the header. Raises FileError if the
    source cannot be read or the target cannot be written, RequestError for invalid settings, ModelError if the model
    cannot be converted that way.
    """
    form = save.form_of(target, to)
    save.check_target(target, overwrite)
    if dtype is not None and dtype not in derive.DTYPES:
        raise RequestError("dtype", f"{printable(dtype, 40)!r} is not known; use {', '.join(derive.DTYPES)}")
    if metadata and form != "safetensors":
        raise RequestError("metadata", f"can only be stored in a .safetensors file; {save.shown(target)} is not one")
    file = layout.open_weights(source)
    found = identify(file)
    # Casting buffers of the noise schedule and the like would only damage them: no network computes with them.
    exempt = {name for name in found.leftovers if len(file.tensors[name].shape) < 2}
    source_infos = file.tensors
    file = derive.cast(file, dtype, exempt)
    if only is not None:
        done = _component(file, found, only, target, form, overwrite, on_work)
    elif form == "diffusers":
        done = _to_folder(file, found, target, on_work)
    else:
        done = _to_file(file, found, target, form, metadata or {}, overwrite, on_work)
    rounded_to = dtype if derive.is_rounded(source_infos, file.tensors) else None
    return replace(done, rounded_to=rounded_to, notes=file.notes)


def _to_file(
    file: ModelFile,
    found: Found,
    target: Path,
    form: save.Form,
    metadata: Mapping[str, str],
    overwrite: bool,
    on_work: OnWork | None,
) -> Converted:
    result, from_folder = file, found.kind.value == "diffusers folder"
    if from_folder:
        found = video.as_single(found)
        result = layout.single_file(file, found, layout.leftovers_of(file.path))
    numbers = {key: str(value) for key, value in file.extra.items() if isinstance(value, int | float | str)}
    result = save.with_metadata(result, {**numbers, **describe(found), **result.metadata, **metadata})

    def check(path: Path) -> None:
        written = open_model(path)
        save.compare(written, result, progress("checking", result.nbytes, on_work))
        if from_folder:
            for name, part in _identify_like(found, written).components.items():
                source = derive.arrange(file, found.component(name).origins)
                # Tensors from the leftovers are in the written file, but not in the folder's components.
                back = derive.keep(derive.arrange(written, part.origins), source)
                save.compare(back, source)

    save.write_file(result, target, form, on_work, check, overwrite=overwrite)
    unplaced = [key for key in file.extra if key not in save.plain_values(file.extra)] if not from_folder else []
    left_out = (
        Counter(f"tensors ({reason})" for reason in layout.reasons(found).values()) if from_folder else Counter[str]()
    )
    if unplaced:
        left_out["values of the training state that are not weights"] = len(unplaced)
    return Converted(len(result), result.nbytes, form, {}, left_out)


def _to_folder(file: ModelFile, found: Found, target: Path, on_work: OnWork | None) -> Converted:
    family = found.family.value
    if found.kind.value == "diffusers folder":
        folder = layout.Folder(file, derive.keep(replace(file, metadata={}), ()))
    else:
        folder = layout.folder(file, found)

    def check(path: Path) -> None:
        written = open_model(path)
        save.compare(written, folder.file, progress("checking", folder.file.nbytes, on_work))
        if folder.file is not file:
            back = layout.single_file(written, _identify_like(found, written), layout.leftovers_of(path))
            if dict(back.tensors) == dict(file.tensors):
                save.compare(back, file)
            else:
                _compare_parts(back, file, found)

    total = folder.file.nbytes + folder.leftovers.nbytes
    tokenizers = family.text.encoders if family is not None and family.text is not None else ()
    save.write_folder(folder.file, target, tokenizers, folder.leftovers, progress("writing", total, on_work), check)
    unnamed = "diffusers folders have no place for it"
    reasons = layout.reasons(found)
    kept = Counter(reasons.get(name, unnamed) for name in folder.leftovers)
    return Converted(len(folder.file), folder.file.nbytes, "diffusers", kept, {})


def _compare_parts(back: ModelFile, file: ModelFile, found: Found) -> None:
    """`save.compare` where the way back gives usual names and shapes and `file` has others, as hybrid ones of a VAE."""
    parts = _identify_like(found, back)
    for name, part in found.components.items():
        save.compare(derive.arrange(back, parts.component(name).origins), derive.arrange(file, part.origins))
    made, sources = (
        {source for part in each.components.values() for source in _sources(part)} for each in (parts, found)
    )
    save.compare(
        derive.keep(back, (name for name in back if name not in made)),
        derive.keep(file, (name for name in file if name not in sources)),
    )


def _component(
    file: ModelFile, found: Found, only: str, target: Path, form: save.Form, overwrite: bool, on_work: OnWork | None
) -> Converted:
    part = found.component(_component_name(found, only))
    inner = derive.arrange(file, part.origins)
    result = replace(inner, metadata=describe(found, part.name), extra={})
    if form == "diffusers":
        result = layout.component_folder(file, part, found)

    def check(path: Path) -> None:
        save.compare(open_model(path), result, progress("checking", result.nbytes, on_work))

    if form == "diffusers":
        save.write_folder(result, target, on_bytes=progress("writing", result.nbytes, on_work), check=check)
    else:
        save.write_file(result, target, form, on_work, check, overwrite=overwrite)
    return Converted(
        len(result), result.nbytes, form, {}, {"tensors of other components": len(file) - len(_sources(part))}
    )


def _component_name(found: Found, only: str) -> str:
    texts = [name for name in found.components if name.startswith("text_encoder")]
    if only == "text" and len(texts) == 1:
        return texts[0]
    if only == "text" and len(texts) > 1:
        raise RequestError("only", f"the model has two text encoders; use {' or '.join(texts)} instead of text")
    name = "text_encoder" if only == "text" else only
    if name not in COMPONENTS:
        raise RequestError("only", f"{printable(only, 40)!r} is not known; use unet, vae or text")
    return name


def _sources(part: Component) -> set[str]:
    """The names in the file of all tensors of `part`."""
    return {source for origin in part.origins.values() for source in origin.sources}


def _identify_like(found: Found, file: ModelFile) -> Found:
    """Identify `file` with the family and prediction of the model it was made from, which its names may not show."""
    family = found.family.value
    prediction = found.prediction.value if found.prediction is not None else None
    return identify(file, family=family.name if family is not None else None, prediction=prediction)

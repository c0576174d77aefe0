"""A derived file written: as .safetensors, as .ckpt, or as a diffusers folder; whole or not at all, and checked.

`compare` reads what was written once more and holds it against what should have been: tensor by tensor, bit by bit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gouache.errors import DamagedFile, FileError, RequestError, printable
from gouache.files.record import ModelFile
from gouache.files.source import size_text
from gouache.files.torch_write import stream_torch
from gouache.files.write import (
    Check,
    OnBytes,
    draft_name,
    remove_litter,
    stream_safetensors,
    sync_folder,
    write_atomic,
)
from gouache.prompts.recipe import EncoderRecipe
from gouache.prompts.tokenizer import vocabulary_files
from gouache.workshop import configs, derive

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["safetensors", "ckpt", "diffusers"]
SUFFIXES: dict[str, Form] = {".safetensors": "safetensors", ".sft": "safetensors", ".ckpt": "ckpt", ".pt": "ckpt",
                             ".pth": "ckpt", ".bin": "ckpt"}  # fmt: skip
LEFTOVERS = "leftovers.safetensors"


def form_of(target: Path, told: str | None) -> Form:
    """What to write at `target`: what was told, else what its name says; a name without an ending is a folder's."""
    said = SUFFIXES.get(target.suffix.lower(), "diffusers")
    if told is None:
        if said == "diffusers" and target.suffix:
            raise RequestError(
                "out", f"{target} ends in neither .safetensors nor .ckpt; for a diffusers folder, add --to diffusers"
            )
        return said
    if told not in ("safetensors", "ckpt", "diffusers"):
        raise RequestError("to", f"{told!r} is not known; use safetensors, ckpt or diffusers")
    if said != told:
        means = "a folder" if said == "diffusers" else f"a .{said} file"
        raise RequestError("to", f"{target} is named like {means}, and {told} was asked for; change one of them")
    return said


def single_form_of(target: Path) -> Form:
    """`form_of` for commands that write single files; RequestError for a folder's name."""
    form = form_of(target, None)
    if form == "diffusers":
        raise RequestError("out", f"{target} does not end in .safetensors or .ckpt; convert the result for a folder")
    return form


def refuse_existing(target: Path, overwrite: bool) -> None:
    """RequestError where `target` is there already. A folder is never overwritten."""
    if not (target.exists() or target.is_symlink()):
        return
    if target.is_dir():
        raise RequestError("out", f"{target} is a folder that exists already; give another name")
    if not overwrite:
        raise RequestError("out", f"{target} exists already; give another name, or --overwrite")


def write_file(
    file: ModelFile, target: Path, form: Form, on_bytes: OnBytes | None = None, check: Check | None = None
) -> str:
    """`file` as one file, which `check` sees before it appears; returns its SHA-256."""
    if form == "ckpt":
        values = plain_values(file.extra)
        return stream_torch(target, file.tensors, file.read, values, on_bytes=on_bytes, check=check)
    return stream_safetensors(target, file.tensors, file.read, file.metadata, on_bytes=on_bytes, check=check)


def write_folder(
    file: ModelFile,
    target: Path,
    tokenizers: Iterable[EncoderRecipe] = (),
    leftovers: ModelFile | None = None,
    on_bytes: OnBytes | None = None,
    check: Check | None = None,
) -> None:
    """`file`, whose tensors are called `component/name`, as a diffusers folder, with `leftovers` kept inside it.

    Names without a component are those of one component alone. The folder is filled under another name, shown to
    `check`, and renamed when all of it is there.
    """
    rest = leftovers if leftovers is not None else derive.keep(file, ())
    part = _draft(target, file.nbytes + rest.nbytes)
    try:
        part.mkdir()
        for path, value in file.extra.items():
            (part / path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(part / path, configs.text_of(value))
        for component, named in _by_component(file).items():
            clip = component.startswith(("text_encoder", "image_encoder"))
            clip = clip or any(name.startswith("text_model.") for name in named)
            weights = part / component / f"{'model' if clip else 'diffusion_pytorch_model'}.safetensors"
            inner = derive.rename(file, named)
            weights.parent.mkdir(exist_ok=True)
            stream_safetensors(weights, inner.tensors, inner.read, {"format": "pt"}, on_bytes=on_bytes)
        for encoder in tokenizers:
            _write_tokenizer(part / encoder.name.replace("text_encoder", "tokenizer"), encoder)
        if leftovers is not None and (len(leftovers) or leftovers.metadata):
            stream_safetensors(
                part / LEFTOVERS, leftovers.tensors, leftovers.read, leftovers.metadata, on_bytes=on_bytes
            )
        if check is not None:
            check(part)
        sync_folder(part)
        os.replace(part, target)
        sync_folder(target.parent)
    except OSError as error:
        raise FileError(target, f"cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _draft(target: Path, size: int) -> Path:
    """The name under which the folder `target` is filled; what killed runs left under such names is removed."""
    parent = target.parent
    if not parent.is_dir():
        raise FileError(target, "cannot be written: the folder it should stand in does not exist")
    remove_litter(parent, ".part")
    free = shutil.disk_usage(parent).free
    if size + 16_000_000 > free:
        raise FileError(target, f"cannot be written: it takes {size_text(size)}, and {size_text(free)} are free there")
    return draft_name(parent, ".part")


def _by_component(file: ModelFile) -> dict[str, dict[str, str]]:
    """{component: {name inside it: name in the file}}; the component of names without one is ""."""
    parts: dict[str, dict[str, str]] = {}
    for whole in file:
        component, _, name = whole.rpartition("/")
        parts.setdefault(component, {})[name] = whole
    return parts


def _write_tokenizer(folder: Path, encoder: EncoderRecipe) -> None:
    folder.mkdir(exist_ok=True)
    files = vocabulary_files()
    files["tokenizer_config.json"] = configs.text_of(configs.tokenizer(encoder))
    files["special_tokens_map.json"] = configs.text_of(configs.special_tokens(encoder))
    for name, content in files.items():
        write_atomic(folder / name, content)


def compare(written: ModelFile, wanted: ModelFile, on_bytes: OnBytes | None = None) -> None:
    """DamagedFile, naming the first tensor that differs, unless both hold the same tensors to the bit."""
    if missing := sorted(set(wanted) ^ set(written)):
        raise DamagedFile(written.path, f"does not lead back to what it was made of: {printable(missing[0])}")
    for name, info in wanted.tensors.items():
        if written.tensors[name] != info or not _same_bits(written.read(name), wanted.read(name)):
            raise DamagedFile(written.path, f"{printable(name)} is not what it was made of: the disk or memory failed")
        if on_bytes is not None:
            on_bytes(info.nbytes)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    import torch

    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a file's extra values that any file can hold: numbers, text, and lists and dictionaries of them."""
    return {key: value for key, value in values.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if value is None or isinstance(value, bool | int | float | str):
        return True
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, dict) and all(
        isinstance(key, str | int) and _is_plain(item) for key, item in value.items()
    )


def with_metadata(file: ModelFile, more: Mapping[str, str]) -> ModelFile:
    """`file` with `more` added to its metadata, over what it said before."""
    return replace(file, metadata={**file.metadata, **more})

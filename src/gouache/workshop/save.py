"""Write a derived file as .safetensors, .ckpt or diffusers folder: completely or not at all, and verified.

`compare` reads the written file back and compares it with the intended tensors, one by one, bit by bit.
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
    remove_stale_temporaries,
    stream_safetensors,
    sync_folder,
    temporary_name,
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


def form_of(target: Path, requested: str | None) -> Form:
    """The form to write `target` in: `requested`, else the one its extension means; no extension means a folder."""
    implied = SUFFIXES.get(target.suffix.lower(), "diffusers")
    if requested is None:
        if implied == "diffusers" and target.suffix:
            raise RequestError(
                "out", f"{target} ends in neither .safetensors nor .ckpt; for a diffusers folder, add --to diffusers"
            )
        return implied
    if requested not in ("safetensors", "ckpt", "diffusers"):
        raise RequestError("to", f"{requested!r} is not known; use safetensors, ckpt or diffusers")
    if implied != requested:
        name_means = "a folder" if implied == "diffusers" else f"a .{implied} file"
        raise RequestError("to", f"{requested} does not match {target}, which names {name_means}; change one of them")
    return implied


def single_form_of(target: Path) -> Form:
    """`form_of` for commands that write single files; RequestError for the name of a folder."""
    form = form_of(target, None)
    if form == "diffusers":
        raise RequestError(
            "out", f"{target} does not end in .safetensors or .ckpt; for a folder, convert the result afterwards"
        )
    return form


def refuse_existing(target: Path, overwrite: bool) -> None:
    """RequestError if `target` exists. A folder is never overwritten."""
    if not (target.exists() or target.is_symlink()):
        return
    if target.is_dir():
        raise RequestError("out", f"{target} is an existing folder; choose another name")
    if not overwrite:
        raise RequestError("out", f"{target} already exists; choose another name, or add --overwrite")


def write_file(
    file: ModelFile, target: Path, form: Form, on_bytes: OnBytes | None = None, check: Check | None = None
) -> str:
    """Write `file` as one file and return its SHA-256. `check` receives its path before it gets its final name."""
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
    """Write `file`, whose tensors are named `component/name`, as a diffusers folder with `leftovers` saved inside it.

    If the names have no component, the folder is that of a single component. The folder is written under a temporary
    name, passed to `check`, and renamed when it is complete.
    """
    rest = leftovers if leftovers is not None else derive.keep(file, ())
    part = _draft(target, file.nbytes + rest.nbytes)
    try:
        part.mkdir()
        for path, value in file.extra.items():
            (part / path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(part / path, configs.text_of(value))
        for component, names in _by_component(file).items():
            clip = component.startswith(("text_encoder", "image_encoder"))
            clip = clip or any(name.startswith("text_model.") for name in names)
            weights = part / component / f"{'model' if clip else 'diffusion_pytorch_model'}.safetensors"
            inner = derive.rename(file, names)
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
    """The temporary name for the folder `target`. Removes what killed runs left under such names."""
    parent = target.parent
    if not parent.is_dir():
        raise FileError(target, "cannot be written: its parent folder does not exist")
    remove_stale_temporaries(parent, ".part")
    free = shutil.disk_usage(parent).free
    if size + 16_000_000 > free:
        raise FileError(target, f"cannot be written: it needs {size_text(size)}, and only {size_text(free)} are free")
    return temporary_name(parent, ".part")


def _by_component(file: ModelFile) -> dict[str, dict[str, str]]:
    """{component: {name inside it: name in the file}}; names without a component are under ""."""
    parts: dict[str, dict[str, str]] = {}
    for full_name in file:
        component, _, name = full_name.rpartition("/")
        parts.setdefault(component, {})[name] = full_name
    return parts


def _write_tokenizer(folder: Path, encoder: EncoderRecipe) -> None:
    folder.mkdir(exist_ok=True)
    files = vocabulary_files()
    files["tokenizer_config.json"] = configs.text_of(configs.tokenizer(encoder))
    files["special_tokens_map.json"] = configs.text_of(configs.special_tokens(encoder))
    for name, content in files.items():
        write_atomic(folder / name, content)


def compare(written: ModelFile, expected: ModelFile, on_bytes: OnBytes | None = None) -> None:
    """Raise DamagedFile naming the first tensor that differs, unless both hold bitwise equal tensors."""
    if unpaired := sorted(set(expected) ^ set(written)):
        raise DamagedFile(
            written.path, f"verification failed: {printable(unpaired[0])} is only in the source or only in the result"
        )
    for name, info in expected.tensors.items():
        if written.tensors[name] != info or not _same_bits(written.read(name), expected.read(name)):
            raise DamagedFile(
                written.path,
                f"verification failed: {printable(name)} differs from the source; the disk or memory failed",
            )
        if on_bytes is not None:
            on_bytes(info.nbytes)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    import torch

    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that any .ckpt file can hold: numbers, text, None, and lists and dictionaries of them."""
    return {key: value for key, value in values.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if value is None or isinstance(value, bool | int | float | str):
        return True
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, dict) and all(
        isinstance(key, str | int) and _is_plain(item) for key, item in value.items()
    )


def with_metadata(file: ModelFile, metadata: Mapping[str, str]) -> ModelFile:
    """`file` with `metadata` added to its own, overwriting equal keys."""
    return replace(file, metadata={**file.metadata, **metadata})

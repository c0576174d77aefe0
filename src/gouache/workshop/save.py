"""Write a derived file as .safetensors, .ckpt or diffusers folder: completely or not at all, and verified.

`compare` reads the written file back and compares it with the intended tensors, one by one, bit by bit. Every file that
the workshop writes goes through `writing`, so that a name is never taken from another program without --overwrite, and
through `true_hashes`, so that no metadata states the hash of other weights.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gouache.errors import DamagedFile, FileError, RequestError, printable
from gouache.files.record import ITEM_SIZE, ModelFile, TensorInfo
from gouache.files.source import size_text
from gouache.files.torch_write import stream_torch
from gouache.files.write import (
    Check,
    OnBytes,
    bytes_of,
    remove_stale_temporaries,
    stream_safetensors,
    sync_folder,
    temporary_name,
    write_atomic,
    write_safetensors,
)
from gouache.prompts.recipe import EncoderRecipe
from gouache.prompts.tokenizer import vocabulary_files
from gouache.workshop import configs, derive
from gouache.workshop.progress import OnWork, progress

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["safetensors", "ckpt", "diffusers"]
SUFFIXES: dict[str, Form] = {".safetensors": "safetensors", ".sft": "safetensors", ".ckpt": "ckpt", ".pt": "ckpt",
                             ".pth": "ckpt", ".bin": "ckpt"}  # fmt: skip
LEFTOVERS = "leftovers.safetensors"
_SPARE = 16_000_000  # bytes that stay free on the disk

# Metadata keys with the hash of the tensors' bytes, of kohya's scripts and ModelSpec, and the text before its digits.
_DATA_HASHES = {"sshs_model_hash": "", "modelspec.hash_sha256": "0x"}
_LEGACY_HASH = "sshs_legacy_hash"  # 8 digits of a hash that depends on the header too
HASH_KEYS = (*_DATA_HASHES, _LEGACY_HASH)


def form_of(target: Path, requested: str | None) -> Form:
    """The form to write `target` in: `requested`, else the one its extension means; no extension means a folder."""
    implied = SUFFIXES.get(target.suffix.lower(), "diffusers")
    if requested is None:
        if implied == "diffusers" and target.suffix:
            raise RequestError(
                "out",
                f"{shown(target)} ends in neither .safetensors nor .ckpt; for a diffusers folder, add --to diffusers",
            )
        return implied
    if requested not in ("safetensors", "ckpt", "diffusers"):
        raise RequestError("to", f"{printable(requested, 40)!r} is not known; use safetensors, ckpt or diffusers")
    if implied != requested:
        name_means = "a folder" if implied == "diffusers" else f"a .{implied} file"
        raise RequestError(
            "to", f"{requested} does not match {shown(target)}, which names {name_means}; change one of them"
        )
    return implied


def single_form_of(target: Path) -> Form:
    """`form_of` for commands that write single files; RequestError for the name of a folder."""
    form = form_of(target, None)
    if form == "diffusers":
        raise RequestError(
            "out", f"{shown(target)} does not end in .safetensors or .ckpt; for a folder, convert the result afterwards"
        )
    return form


def shown(path: Path) -> str:
    """`path` for a message."""
    return printable(str(path))


def check_target(target: Path, overwrite: bool) -> None:
    """Before any work: RequestError if `target` exists, FileError if it cannot be written. No folder is overwritten."""
    try:
        exists = _is_taken(target)
        folder = target.is_dir()
        if not target.parent.is_dir():
            raise FileError(target, "cannot be written: its folder does not exist")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise FileError(target, "cannot be written: its folder is write-protected")
    except OSError as error:
        raise FileError(target, f"cannot be written: {error.strerror}") from None
    except ValueError:  # a NUL in the name
        raise FileError(target, "cannot be written: it is not a possible file name") from None
    if folder:
        raise RequestError("out", f"{shown(target)} is an existing folder; choose another name")
    if exists and not overwrite:
        raise _exists(target)


def _is_taken(target: Path) -> bool:
    """Whether there is anything at `target`, also a broken link. Raises OSError, as for a name that is too long."""
    try:
        os.lstat(target)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _exists(target: Path) -> RequestError:
    return RequestError("out", f"{shown(target)} already exists; choose another name, or add --overwrite")


@contextmanager
def writing(target: Path, overwrite: bool) -> Iterator[None]:
    """Context manager for writing `target`, with `new=not overwrite`. Raises RequestError if `target` exists.

    Errors of the block that name an unfinished file name `target` instead.
    """
    check_target(target, overwrite)
    try:
        yield
    except FileError as error:
        raise _about(error, target) from error
    except FileExistsError:
        raise _exists(target) from None
    except OSError as error:
        raise FileError(target, f"cannot be written: {error.strerror or error}") from error


def _about(error: FileError, target: Path) -> FileError:
    """`error`, naming `target` if it names an unfinished file."""
    unfinished = ".gouache-" in str(error.path) or str(error.path).startswith("/proc/self/fd/")
    if not unfinished:
        return error
    return type(error)(target, str(error).removeprefix(f"{printable(str(error.path))}: "))


def write_file(
    file: ModelFile,
    target: Path,
    form: Form,
    on_work: OnWork | None = None,
    check: Check | None = None,
    *,
    what: str = "writing",
    overwrite: bool = False,
) -> str:
    """Write `file` as one file and return its SHA-256. `check` receives its path before it gets its final name.

    Raises RequestError if `target` exists, unless `overwrite` is true.
    """
    new = not overwrite
    with writing(target, overwrite):
        if form == "ckpt":
            values, on_bytes = plain_values(file.extra), progress(what, file.nbytes, on_work)
            return stream_torch(target, file.tensors, file.read, values, on_bytes=on_bytes, check=check, new=new)
        metadata = true_hashes(file, on_work)
        on_bytes = progress(what, file.nbytes, on_work)
        return stream_safetensors(target, file.tensors, file.read, metadata, on_bytes=on_bytes, check=check, new=new)


def write_tensors(
    target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """Write tensors in memory as a .safetensors file, without the hashes that `metadata` may state of other tensors."""
    with writing(target, overwrite):
        write_safetensors(target, tensors, without_hashes(metadata), new=not overwrite)


def without_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    """`metadata` without the keys that state a hash of the file's weights."""
    return {key: value for key, value in metadata.items() if key not in HASH_KEYS}


def true_hashes(file: ModelFile, on_work: OnWork | None = None) -> dict[str, str]:
    """The metadata of `file` with the hashes that it states computed again, over the tensors as they will be written.

    It takes no time if no hash is stated. The legacy hash, which depends on the header, is kept with unchanged tensors
    and left out with others.
    """
    stated = [key for key in _DATA_HASHES if key in file.metadata]
    metadata = without_hashes(file.metadata)
    if not stated:
        return metadata
    digest, on_bytes = hashlib.sha256(), progress("hashing", file.nbytes, on_work)
    for name in sorted(file.tensors, key=lambda name: _position(name, file.tensors[name])):
        digest.update(bytes_of(name, file.read(name), file.tensors[name]))
        if on_bytes is not None:
            on_bytes(file.tensors[name].nbytes)
    found = {key: _DATA_HASHES[key] + digest.hexdigest() for key in stated}
    unchanged = all(file.metadata[key].lower() == value for key, value in found.items())
    if unchanged and _LEGACY_HASH in file.metadata:
        found[_LEGACY_HASH] = file.metadata[_LEGACY_HASH]
    return metadata | found


_RANK = {dtype: rank for rank, dtype in enumerate(ITEM_SIZE)}


def _position(name: str, info: TensorInfo) -> tuple[int, str]:
    """Sorts tensors as `stream_safetensors` writes them."""
    return _RANK[info.dtype], name


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
        if os.path.lexists(target):  # os.replace would replace an empty folder, and on POSIX nothing else
            raise _exists(target)
        os.replace(part, target)
        sync_folder(target.parent)
    except FileError as error:
        raise _about(error, target) from error
    except OSError as error:
        if os.path.lexists(target):  # made by another program since the check
            raise _exists(target) from None
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
    if size + _SPARE > free:
        needed = f"{size_text(size)}, and {size_text(_SPARE)} that stay free,"
        raise FileError(target, f"cannot be written: it needs {needed} and only {size_text(free)} are free")
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

"""Opens one file of any format as a record: its content selects the reader, its name is only a hint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gouache.errors import DamagedFile, NotAModel
from gouache.files.content import kind_of, unknown_format_error
from gouache.files.pickle_file import read_pickle
from gouache.files.picture_file import is_picture, read_picture
from gouache.files.record import ModelFile
from gouache.files.safetensors_file import read_safetensors
from gouache.files.source import Source

_SUFFIXES = {
    ".safetensors": "safetensors", ".sft": "safetensors",
    ".ckpt": "pickle", ".pt": "pickle", ".pth": "pickle", ".pkl": "pickle", ".bin": "pickle",
}  # fmt: skip


def open_file(path: str | Path) -> ModelFile:
    """The weight file at `path` as a record. A suffix that contradicts the content is mentioned in its notes.

    Raises FileError if it cannot be read; NotAModel, DamagedFile or UnsafeFile if its content cannot be used.
    """
    return read_file(Source(path))


def read_file(source: Source) -> ModelFile:
    """Same as `open_file`, for a file that is already open."""
    if is_picture(source) and (embedding := read_picture(source)) is not None:
        return embedding
    kind = kind_of(source)
    if kind == "shard index":
        raise NotAModel(source.path, "is the index of a sharded model; open it as a model, not as a single file")
    if kind == "safetensors":
        return _with_suffix_note(read_safetensors(source), "safetensors")
    if kind == "pickle":
        return _with_suffix_note(read_pickle(source), "pickle")
    try:
        return _with_suffix_note(read_pickle(source), "pickle")  # a pickle of protocol 0 may begin with any bytes
    except DamagedFile:
        raise unknown_format_error(source) from None


def _with_suffix_note(file: ModelFile, kind: str) -> ModelFile:
    suffix = file.path.suffix.lower()
    if _SUFFIXES.get(suffix, kind) == kind:
        return file
    note = f"the name ends in {suffix}, but the content is a {file.format} file"
    return replace(file, notes=(note, *file.notes))

"""Opens any path that can hold a model, as a record."""

from __future__ import annotations

import re
from pathlib import Path

from gouache.errors import FileError, RequestError, printable
from gouache.files.content import kind_of
from gouache.files.folder import open_folder, read_shards
from gouache.files.picture_file import is_picture
from gouache.files.record import ModelFile
from gouache.files.scaled import with_scales
from gouache.files.single_file import read_file
from gouache.files.source import Source
from gouache.files.wrapping import unwrapped


def open_model(path: str | Path, *, variant: str | None = None) -> ModelFile:
    """The model at `path`: a weight file of any kind, a diffusers folder, one component of it, or a shard index.

    Reads names, shapes and metadata, no weights; does not import torch. `variant` selects among the weights of a
    folder ('fp16'). Wrappers around the names are removed (`wrapping`), and scaled fp8 weights are multiplied by their
    scales (`scaled`). Raises a FileError with a one-line message if the path cannot be opened. Nothing in a file
    is ever run.
    """
    path = Path(path)
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", variant):
        raise RequestError("variant", f"{printable(variant, 60)!r} is not a variant name; expected one like 'fp16'")
    try:
        if path.is_dir():
            return with_scales(open_folder(path, variant))
        source = Source(path)
        shards = not is_picture(source) and kind_of(source) == "shard index"
        return with_scales(unwrapped(read_shards(source) if shards else read_file(source)))
    except OSError as error:
        raise FileError(path, f"cannot be opened: {error.strerror}") from None

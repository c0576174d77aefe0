"""Edit the metadata in a safetensors header, and add a thumbnail to it."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gouache.errors import RequestError, printable
from gouache.files.metadata import write_metadata
from gouache.files.open import open_model
from gouache.images import pixels
from gouache.workshop import save

THUMBNAIL = 256  # pixels along the longer side, as ModelSpec requires
KEY = "modelspec.thumbnail"


def change(
    source: Path,
    target: Path | None,
    put: Mapping[str, str],
    unset: Sequence[str] = (),
    thumbnail: Path | None = None,
    *,
    overwrite: bool = False,
) -> tuple[Path, dict[str, str]]:
    """Write `source` as `target` with changed metadata. Returns the path of the file and all of its metadata.

    Without `target` the file itself is changed, also where `source` is a link to it. Raises RequestError for a file of
    another format, for a key in `unset` that is not in the metadata, and if `target` exists, unless `overwrite` is
    true.
    """
    file, name = open_model(source), printable(str(source))
    if file.format != "safetensors":
        raise RequestError("file", f"{name} is {file.format}, which has no metadata; convert it to .safetensors first")
    for key in unset:
        if key not in file.metadata:
            raise RequestError("unset", f"{printable(key)!r} is not in the metadata of {name}")
    in_place = target is None or _is_same(source, target)
    path = Path(os.path.realpath(source)) if in_place or target is None else target
    if in_place and source.is_symlink() and path.parent.name == "blobs":
        raise RequestError("file", f"{name} is in the cache of Hugging Face, whose files must not change; use --output")
    texts = {key: value for key, value in file.metadata.items() if key not in unset} | dict(put)
    if thumbnail is not None:
        texts[KEY] = data_url(thumbnail)
    replaced = overwrite or in_place
    with save.writing(path, replaced):
        write_metadata(source, path, texts, new=not replaced)
    return (source if in_place and not source.is_symlink() else path), texts


def _is_same(source: Path, target: Path) -> bool:
    try:
        return target.samefile(source)
    except (OSError, ValueError):
        return False


def data_url(picture: Path) -> str:
    """A thumbnail of the picture as a data URL (JPEG)."""
    small = pixels.read(picture, "thumbnail")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

"""Edit the metadata in a safetensors header, and add a thumbnail to it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from gouache.errors import RequestError, printable
from gouache.files.metadata import write_metadata
from gouache.files.open import open_model
from gouache.images import pixels

THUMBNAIL = 256  # pixels along the longer side, as ModelSpec requires
KEY = "modelspec.thumbnail"


def change(
    source: Path, target: Path, put: Mapping[str, str], unset: Sequence[str] = (), thumbnail: Path | None = None
) -> dict[str, str]:
    """Write `source` as `target` (which may be the same path) with changed metadata, and return all of the metadata.

    Raises RequestError for a file of another format, or for a key in `unset` that is not in the metadata.
    """
    file = open_model(source)
    if file.format != "safetensors":
        raise RequestError(
            "file",
            f"{printable(str(source))} is {file.format}, which has no metadata; convert it to .safetensors first",
        )
    for key in unset:
        if key not in file.metadata:
            raise RequestError("unset", f"{printable(key)!r} is not in the metadata of {printable(str(source))}")
    texts = {key: value for key, value in file.metadata.items() if key not in unset} | dict(put)
    if thumbnail is not None:
        texts[KEY] = data_url(thumbnail)
    write_metadata(source, target, texts)
    return texts


def data_url(picture: Path) -> str:
    """A thumbnail of the picture as a data URL (JPEG)."""
    small = pixels.read(picture, "thumbnail")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

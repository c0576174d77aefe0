"""The text in a safetensors header: changed in words, or by a picture to know the model by."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from gouache.errors import RequestError, printable
from gouache.files.metadata import write_metadata
from gouache.files.open import open_model
from gouache.images import pixels

THUMBNAIL = 256  # pixels along the longer side, as ModelSpec asks
KEY = "modelspec.thumbnail"


def change(
    source: Path, target: Path, put: Mapping[str, str], unset: Sequence[str] = (), thumbnail: Path | None = None
) -> dict[str, str]:
    """Write `source` as `target` (which may be the same) with changed metadata; returns all of it.

    Raises RequestError for a file of another kind, or a key to remove that is not there.
    """
    file = open_model(source)
    if file.format != "safetensors":
        raise RequestError(
            "file", f"{printable(str(source))} is {file.format}, which has no metadata; convert it first"
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
    """The picture, made small, as the data URL of a JPEG."""
    small = pixels.read(picture, "thumbnail")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

"""Replaces the metadata of a safetensors file: a new header, then the same tensor bytes in the same order.

Every hash that skips the header (AutoV3, kohya's) therefore stays the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from gouache.errors import FileError
from gouache.files.safetensors_file import read_safetensors
from gouache.files.source import Source
from gouache.files.write import atomic_output

_PIECE = 1 << 24


def write_metadata(source: Path, target: Path, metadata: Mapping[str, str], *, new: bool = False) -> str:
    """Writes the safetensors file `source` with `metadata` instead of its own to `target`; returns its SHA-256.

    `target` may be `source`: the file is replaced, not written in place; `new` is that of `write.atomic_output`. Raises
    FileError, or DamagedFile if `source` is not a valid safetensors file.
    """
    opened = Source(source)
    read_safetensors(opened)  # checks every rule of the header before anything is written
    start = 8 + int.from_bytes(opened.data[:8], "little")
    fields = json.loads(opened.data[8:start])
    fields.pop("__metadata__", None)
    try:
        # The names keep their order, and offsets count from the end of the header: no tensor moves relative to another.
        text = json.dumps(
            {"__metadata__": dict(metadata), **fields}, ensure_ascii=False, separators=(",", ":")
        ).encode()
    except UnicodeEncodeError:
        raise FileError(target, "cannot be written: a metadata text is not valid Unicode") from None
    text += b" " * (-len(text) % 8)
    with atomic_output(target, 8 + len(text) + opened.size - start, new=new) as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for at in range(start, opened.size, _PIECE):
            output.write(opened.data[at : at + _PIECE])
    return output.digest.hexdigest()

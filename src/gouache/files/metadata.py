"""A safetensors file with other metadata: a new header, and behind it the same bytes in the same order.

So every hash that leaves the header out (AutoV3, kohya's) stays what it was.
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


def write_metadata(source: Path, target: Path, metadata: Mapping[str, str]) -> str:
    """The safetensors file `source` with `metadata` in place of its own, as `target`; returns its SHA-256.

    `target` may be `source`: it is replaced, not written to. Raises FileError, or DamagedFile for a file that is none.
    """
    opened = Source(source)
    read_safetensors(opened)  # all of the header's rules hold, or nothing is written
    start = 8 + int.from_bytes(opened.data[:8], "little")
    fields = json.loads(opened.data[8:start])
    fields.pop("__metadata__", None)
    try:
        # The names keep their order, and the offsets count from the header's end: no tensor moves against another.
        text = json.dumps(
            {"__metadata__": dict(metadata), **fields}, ensure_ascii=False, separators=(",", ":")
        ).encode()
    except UnicodeEncodeError:
        raise FileError(target, "cannot be written: a metadata text is not valid Unicode") from None
    text += b" " * (-len(text) % 8)
    with atomic_output(target, 8 + len(text) + opened.size - start) as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for at in range(start, opened.size, _PIECE):
            output.write(opened.data[at : at + _PIECE])
    return output.digest.hexdigest()

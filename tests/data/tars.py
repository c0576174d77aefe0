"""Tar shards for tests, written by Python's own tarfile."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from .pictures import photo


def encoded(seed: int = 0, size: tuple[int, int] = (24, 16), format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    photo(seed, size).save(buffer, format)
    return buffer.getvalue()


def damaged(picture: bytes) -> bytes:
    """Its header can be read, its pixels cannot."""
    return picture[: len(picture) // 2]


def write(path: Path, members: Mapping[str, bytes | str], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pack(folder: Path, shards: Path, counts: Sequence[int]) -> Path:
    """The files of `folder`, in order of their names, as samples of shards with so many samples each."""
    names = sorted(each.name for each in folder.iterdir() if each.is_file())
    keys = sorted({name.partition(".")[0] for name in names})
    for number, count in enumerate(counts):
        here, keys = keys[:count], keys[count:]
        inside = [name for key in here for name in names if name.partition(".")[0] == key]
        write(shards / f"set-{number:06d}.tar", {name: (folder / name).read_bytes() for name in inside})
    assert not keys
    return shards

"""What picture files contain: sizes, hashes of their bytes, hashes of how they look.

Hashes are cached until a file changes. A cache is a file of lines, `[key, value]` in JSON; the key has the path, size,
times of change and inode of a picture.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

from gouache.data.members import File, read_bytes, read_size, state_of
from gouache.errors import FileError, RequestError
from gouache.files.write import write_atomic
from gouache.images import pixels
from gouache.outside import MalformedText, parse_json, read_text

OnWork = Callable[[str, int, int], None]
"""(what, done, total) of a work in progress, in pictures."""

SETTING = "data"  # the setting that errors name
_MAX_CACHE = 2**30  # bytes
_WORKERS = min(4, os.cpu_count() or 1)  # each holds a decoded picture

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Content:
    """`sha256` is that of the file's bytes, `size` (width, height) that of the upright picture.

    `look` and `mirrored` are the 64-bit difference hashes (see `look_of`) of the picture and of its mirror image.
    """

    sha256: str
    size: tuple[int, int]
    look: int
    mirrored: int


def sizes(paths: Sequence[File]) -> list[tuple[int, int]]:
    """(width, height) of each picture, upright, from the headers of the files.

    Raises RequestError for the first that cannot be read.
    """
    return [_good(size) for size in in_threads(lambda path: read_size(path, SETTING), paths)]


def hashes(paths: Sequence[File], cache: Path | None = None, on_work: OnWork | None = None) -> list[str]:
    """The SHA-256 of each file, in hexadecimal. Raises RequestError for the first that cannot be read."""
    found = _cached("sha256", _sha256, _is_sha256, paths, cache, on_work)
    return [_good(each) for each in found]


def contents(
    paths: Sequence[File], cache: Path | None = None, on_work: OnWork | None = None
) -> list[Content | RequestError]:
    """What each picture contains, or why it cannot be read: all pixels are decoded."""
    found = _cached("content", _content, _is_content, paths, cache, on_work)
    return [each if isinstance(each, RequestError) else _to_content(each) for each in found]


def look_of(picture: Image.Image) -> int:
    """The difference hash: a bit for each pair of neighbours in an 8x9 grey picture, 1 where the right one is lighter.

    Row by row from the top left, the first is the highest bit. Copies in another size, format or quality differ in few
    bits, other pictures in about half of the 64.
    """
    small = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.LANCZOS))
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


def _content(path: File) -> list[Any]:
    data = read_bytes(path, SETTING)
    picture = pixels.on_white(pixels.decode(data, str(path), SETTING))
    looks = look_of(picture), look_of(ImageOps.mirror(picture))
    return [hashlib.sha256(data).hexdigest(), *picture.size, *looks]


def _to_content(value: Any) -> Content:
    digest, width, height, look, mirrored = value
    return Content(digest, (width, height), look, mirrored)


def _is_content(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 5 and _is_sha256(value[0]) and all(map(_is_count, value[1:]))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**64


def _sha256(path: File) -> str:
    return hashlib.sha256(read_bytes(path, SETTING)).hexdigest()


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _cached(
    kind: str,
    read: Callable[[File], T],
    is_valid: Callable[[Any], bool],
    paths: Sequence[File],
    cache: Path | None,
    on_work: OnWork | None,
) -> list[T | RequestError]:
    """`read` of each path, or why it failed. What is read is added to the cache, also if the work is interrupted."""
    known: dict[str, Any] = {key: value for key, value in _read_cache(cache).items() if is_valid(value)}
    new = dict[str, T]()

    def look_up(path: File) -> T:
        key = f"{kind}|{state_of(path)}"
        if key not in known:
            new[key] = read(path)
        return known[key] if key in known else new[key]

    def report(done: int) -> None:
        if on_work is not None:
            on_work("reading pictures", done, len(paths))

    try:
        return in_threads(look_up, paths, report)
    finally:
        if cache is not None and new:
            _write_cache(cache, {**_read_cache(cache), **new})  # another process may have added some meanwhile


def _read_cache(cache: Path | None) -> dict[str, Any]:
    """Empty if there is none; lines that are damaged are passed over."""
    if cache is None:
        return {}
    try:
        lines = read_text(cache, _MAX_CACHE).splitlines()
    except FileError:
        return {}
    known = dict[str, Any]()
    for line in lines:
        with suppress(MalformedText, ValueError, TypeError):
            key, value = parse_json(line)
            known[key] = value
    return known


def _write_cache(cache: Path, values: Mapping[str, Any]) -> None:
    """A cache that cannot be written is no error: it only costs time."""
    lines = "".join(json.dumps(entry) + "\n" for entry in values.items())
    with suppress(OSError, FileError):
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(cache, lines.encode())


def in_threads(
    work: Callable[[S], T], items: Sequence[S], on_done: Callable[[int], None] | None = None
) -> list[T | RequestError]:
    """`work` on each item, in order, or the RequestError that it raises; `on_done` receives how many are done."""

    def safe(item: S) -> T | RequestError:
        try:
            return work(item)
        except RequestError as error:
            return error

    # A list, not a generator: one that is left half-way would be ended by the garbage collector, in any thread, where
    # waiting for the pool's threads can block for ever.
    found = list[T | RequestError]()
    pool = ThreadPoolExecutor(_WORKERS)
    try:
        for result in pool.map(safe, items):
            found.append(result)
            if on_done is not None:
                on_done(len(found))
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _good(value: T | RequestError) -> T:
    if isinstance(value, RequestError):
        raise value
    return value

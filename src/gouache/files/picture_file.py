"""Embeddings stored inside pictures, as A1111 writes them for sharing; read without running anything.

    text chunk    `sd-ti-embedding`: base64 of JSON, in which {"TORCHTENSOR": numbers} is a tensor
    pixels        the same JSON, deflated, four bits per channel: in stripes left and right of the picture, each
                  separated from it by a black column; the left one has the lower halves of the bytes, the right one
                  the upper halves, both XORed with the numbers of a linear congruential generator

The second form survives the removal of text chunks; it is the one that WebP and re-saved PNG files have.
"""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gouache.errors import DamagedFile, NotAModel
from gouache.files.record import ModelFile, TensorInfo
from gouache.files.source import Source, tensor_from
from gouache.outside import parse_json

if TYPE_CHECKING:
    import numpy as np

_CHUNK = b"sd-ti-embedding"
_MAX_JSON = 16_000_000  # bytes: 75 vectors of SDXL's width as text are about 3 MB
_MAX_NUMBERS = 1_000_000
_MAX_PIXELS = 16_000_000
_MAX_NIBBLES = 8_000_000
_MAX_CHUNKS = 10_000


def is_picture(source: Source) -> bool:
    """Whether the file is a picture in a format that can contain an embedding."""
    return source.data[:8] == b"\x89PNG\r\n\x1a\n" or source.data[8:12] == b"WEBP"


def read_picture(source: Source) -> ModelFile | None:
    """The embedding in a PNG or WebP picture; None if there is none. Raises DamagedFile for an incomplete one."""
    content = _from_chunk(source) if source.data[:8] == b"\x89PNG\r\n\x1a\n" else None
    where = "a text chunk of a PNG picture"
    if content is None:
        content, where = _from_pixels(source), "the pixels of a picture"
    if content is None:
        return None
    tensors: dict[str, tuple[TensorInfo, bytes]] = {}
    extra = {key: _split_tensors(source, key, value, tensors) for key, value in content.items()}
    if not tensors:
        raise NotAModel(source.path, "is a picture that contains an embedding without vectors")
    return ModelFile(
        path=source.path,
        format="picture",
        tensors={name: info for name, (info, _) in tensors.items()},
        read=lambda name: tensor_from(bytearray(tensors[name][1]), 0, tensors[name][0]),
        extra={key: value for key, value in extra.items() if value is not _TENSORS},
        notes=(f"the embedding is stored in {where}",),
        files=(source.path,),
    )


_TENSORS = object()


def _split_tensors(
    source: Source, name: str, value: Any, tensors: dict[str, tuple[TensorInfo, bytes]], depth: int = 0
) -> Any:
    """`value` with its tensors moved to `tensors`; a value that contained only tensors becomes `_TENSORS`."""
    if depth > 8:
        raise DamagedFile(source.path, "its embedding nests values more than 8 levels deep")
    if not isinstance(value, dict):
        return value
    if set(value) == {"TORCHTENSOR"}:
        tensors[name] = _tensor(source, value["TORCHTENSOR"])
        return _TENSORS
    inner = {key: _split_tensors(source, f"{name}.{key}", each, tensors, depth + 1) for key, each in value.items()}
    left = {key: each for key, each in inner.items() if each is not _TENSORS}
    return left if left or not inner else _TENSORS


def _tensor(source: Source, rows: Any) -> tuple[TensorInfo, bytes]:
    """The tensor of a JSON vector or matrix: float32, shape (vectors, width)."""
    matrix = rows if isinstance(rows, list) and rows and isinstance(rows[0], list) else [rows]
    numbers: list[float] = []
    width = len(matrix[0]) if isinstance(matrix[0], list) else 0
    for row in matrix:
        if not isinstance(row, list) or len(row) != width or not width:
            raise DamagedFile(source.path, "its embedding has a tensor that is not a matrix of numbers")
        numbers += row
        if len(numbers) > _MAX_NUMBERS:
            raise DamagedFile(source.path, f"its embedding has more than {_MAX_NUMBERS:,} numbers")
    try:
        packed = struct.pack(f"<{len(numbers)}f", *numbers)
    except (struct.error, OverflowError):
        raise DamagedFile(source.path, "its embedding has a tensor with something other than numbers") from None
    return TensorInfo((len(matrix), width), "F32"), packed


def _from_chunk(source: Source) -> dict[str, Any] | None:
    for kind, body in _chunks(source):
        if kind != b"tEXt" or not body.startswith(_CHUNK + b"\0"):
            continue
        try:
            return _json(source, base64.b64decode(body[len(_CHUNK) + 1 :], validate=True))
        except binascii.Error:
            raise DamagedFile(
                source.path, "its embedding is not valid base64: the picture was cropped or edited"
            ) from None
    return None


def _chunks(source: Source) -> Iterator[tuple[bytes, bytes]]:
    """The text chunks of a PNG file; other chunks are skipped unread."""
    at = 8
    for _ in range(_MAX_CHUNKS):
        if at + 12 > source.size:
            return
        length = int.from_bytes(source.data[at : at + 4], "big")
        kind = source.data[at + 4 : at + 8]
        if kind == b"IEND" or at + 12 + length > source.size:
            return
        if kind == b"tEXt" and length <= 2 * _MAX_JSON:
            yield kind, source.data[at + 8 : at + 8 + length]
        at += 12 + length


def _json(source: Source, raw: bytes) -> dict[str, Any]:
    if len(raw) > _MAX_JSON:
        raise DamagedFile(source.path, f"its embedding takes more than {_MAX_JSON:,} bytes")
    try:
        content = parse_json(raw.decode())
    except ValueError:  # MalformedText, or bytes that are not UTF-8
        raise DamagedFile(source.path, "its embedding is not valid JSON: the picture was cropped or edited") from None
    if not isinstance(content, dict):
        raise DamagedFile(source.path, "its embedding is not a JSON object")
    return content


def _from_pixels(source: Source) -> dict[str, Any] | None:
    import io

    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source.data[:]), formats=("PNG", "WEBP")) as opened:
            if opened.width * opened.height > _MAX_PIXELS:
                return None
            pixels = np.asarray(opened.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    lit: np.ndarray = np.all(pixels > 0, axis=2)
    columns: np.ndarray = np.max(lit, axis=0)
    rows: np.ndarray = np.max(lit, axis=1)
    if not columns.any():
        return None
    first, last = int(columns.argmax()), len(columns) - int(columns[::-1].argmax())
    top, bottom = int(rows.argmax()), len(rows) - int(rows[::-1].argmax())
    halves = pixels[top:bottom, first:last] & 0x0F
    black = np.flatnonzero(halves.sum(axis=(0, 2), dtype=np.int64) == 0)
    if len(black) < 2:
        return None
    lower, upper = halves[:, : black[0]], halves[:, black[-1] + 1 :]
    if lower.shape != upper.shape or not 0 < lower.size <= _MAX_NIBBLES:
        return None
    packed = ((_unmasked(upper) << 4) | _unmasked(lower)).tobytes()
    reader = zlib.decompressobj()
    try:
        raw = reader.decompress(packed, _MAX_JSON + 1)
    except zlib.error:
        return None  # the stripes are ordinary pixels without data
    return _json(source, raw)


def _unmasked(block: np.ndarray) -> np.ndarray:
    """`block` XORed with the generator x -> 1664525 x + 1013904223 mod 2^32, its numbers taken modulo 255."""
    import numpy as np

    # Started at 0, its n-th number is 1013904223 (1 + a + ... + a^(n-1)) with a = 1664525; uint32 wraps at 2^32.
    factors = np.full(block.size, 1664525, np.uint32)
    factors[0] = 1
    numbers = np.cumsum(np.cumprod(factors, dtype=np.uint32), dtype=np.uint32) * np.uint32(1013904223)
    return block ^ ((numbers % np.uint32(255)).astype(np.uint8).reshape(block.shape) & 0x0F)

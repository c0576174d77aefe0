"""Detects from its bytes what a file is: a kind that a reader of this folder opens, or an error that says what else.

Most files that fail to open are not damaged models but something else with a model's name: a web page, a server's
error message, a git-lfs pointer, a picture, a model of another program. Each has its own message with what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from gouache.errors import DamagedFile, FileError, NotAModel, printable
from gouache.files.source import Source, size_text
from gouache.outside import parse_json

Kind = Literal["safetensors", "pickle", "shard index", "unknown"]

_HEAD = 4096
MAX_JSON = 4_000_000  # bytes; the largest shard index of a diffusion model has some 200,000

_MODELS_ELSEWHERE = "get the .safetensors or .ckpt file for PyTorch instead"

# (offset, bytes at this offset, what it is, what to do)
_SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", "a PNG picture", "a model's preview picture often has the model's name"),
    (0, b"\xff\xd8\xff", "a JPEG picture", "a model's preview picture often has the model's name"),
    (8, b"WEBP", "a WebP picture", "a model's preview picture often has the model's name"),
    (0, b"GIF8", "a GIF picture", "a model's preview picture often has the model's name"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first"),
    (0, b"Rar!\x1a\x07", "a RAR archive", "unpack it first"),
    (0, b"\xfd7zXZ\x00", "an xz archive", "unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it first"),
    (0, b"BZh", "a bzip2 archive", "unpack it first"),
    (0, b"PK\x05\x06", "an empty zip archive", "fetch the file again"),
    (0, b"GGUF", "a GGUF model of llama.cpp or stable-diffusion.cpp", _MODELS_ELSEWHERE),
    (0, b"lmgg", "a GGML model", _MODELS_ELSEWHERE),
    (0, b"tjgg", "a GGML model", _MODELS_ELSEWHERE),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes weights", _MODELS_ELSEWHERE),
    (4, b"TFL3", "a TensorFlow Lite model", _MODELS_ELSEWHERE),
    (0, b"\x93NUMPY", "a numpy array", "a model is a file of many named tensors"),
    (0, b"%PDF", "a PDF document", "fetch the model file itself"),
    (0, b"MZ", "a Windows program", "do not run it; fetch the model file itself"),
    (0, b"\x7fELF", "a Linux program", "do not run it; fetch the model file itself"),
)

# The last eight bytes of every LevelDB table, the format of TensorFlow's `.index` and of its oldest `.ckpt`.
_LEVELDB_END = bytes.fromhex("57fb808b247547db")

_TENSORFLOW = (
    "a TensorFlow {part} and holds no Stable Diffusion weights for PyTorch: the name is used for another kind of "
    "checkpoint too. Get the .safetensors or .ckpt file of the model instead"
)


def kind_of(source: Source) -> Kind:
    """Which reader opens the file; "unknown" for a file without a signature, such as a pickle of protocol 0.

    Raises NotAModel for a file of another kind, DamagedFile for a download that was never finished.
    """
    path, size = source.path, source.size
    if size == 0:
        raise NotAModel(path, "is empty: the download failed, fetch it again")
    head = source.data[:_HEAD]
    if head[4:9] == b"\0\0\0\0{":  # first, because the length before it may look like any other signature
        return "safetensors"
    if head.startswith(b"PK\x03\x04") or (head[257:262] == b"ustar" and size >= 512):
        return "pickle"
    for offset, signature, what, advice in _SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            raise NotAModel(path, f"is {what}, not a model: {advice}")
    if len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return "pickle"

    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if b"\0" not in head and (text[:1] in (b"{", b"[", b"<") or head.startswith(b"version https://git-lfs")):
        return _text_kind(source, text)
    if _claims_safetensors(head):
        return "safetensors"
    if source.data[-8:] == _LEVELDB_END:
        raise NotAModel(path, "is " + _TENSORFLOW.format(part="checkpoint index (a LevelDB table)"))
    if _is_meta_graph(source):
        raise NotAModel(path, "is " + _TENSORFLOW.format(part="graph (a MetaGraphDef, as in .meta files)"))
    if head[:1] == b"\x08" and head[2:3] == b"\x12" and b"onnx" in head[:200].lower() + path.suffix.lower().encode():
        raise NotAModel(path, f"is an ONNX model: {_MODELS_ELSEWHERE}")
    if not head.strip(b"\0"):
        raise DamagedFile(path, "begins with zeros only: the download was never finished, fetch it again")
    return "unknown"


def unknown_format_error(source: Source) -> FileError:
    """The error for bytes that begin like no known format; the name of the file gives further hints."""
    name = source.path.name.lower()
    if re.search(r"\.data-\d+-of-\d+$", name):
        return NotAModel(source.path, "is " + _TENSORFLOW.format(part="checkpoint's data part (by its name)"))
    if source.path.suffix.lower() in (".safetensors", ".sft"):
        return DamagedFile(source.path, "does not begin like a safetensors file: it is damaged, fetch it again")
    begin = source.data[:200]
    if len(begin) > 3 and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in begin):
        return NotAModel(source.path, f"is a text file, not a model; it begins {printable(begin.decode(), 40)!r}")
    return NotAModel(
        source.path, f"has an unknown format ({size_text(source.size)}, begins with {source.data[:8].hex(' ')})"
    )


def _claims_safetensors(head: bytes) -> bool:
    """Whether there is a wrong length or white space before the '{'; the safetensors reader then names the fault."""
    text = all(32 <= byte < 127 for byte in head[:8])
    return not text and head[8:].lstrip(b" \t\r\n\xef\xbb\xbf")[:1] == b"{"


def _text_kind(source: Source, text: bytes) -> Kind:
    """Raises the error for a text file. The one text file that can be opened is the index of a sharded model."""
    path = source.path
    lowered = text[:1000].lower()
    if text.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize (\d{1,15})\n", text)
        amount = f" to {size_text(int(size[1]))}" if size else ""
        raise NotAModel(path, f"is a git-lfs pointer{amount}, not the model itself: fetch it with 'git lfs pull'")
    if lowered.startswith((b"<!doctype html", b"<html", b"<head", b"<!--")) or b"<html" in lowered:
        raise NotAModel(path, "is a web page saved under a model's name: log in or accept the licence, fetch it again")
    if text.startswith(b"<"):
        raise NotAModel(path, "is XML, often a server's error message, not a model: fetch it again")
    document = json_document(source)
    if isinstance(document, dict) and isinstance(document.get("weight_map"), dict):
        return "shard index"
    if isinstance(document, dict) and any(key.startswith("_class") or key == "architectures" for key in document):
        raise NotAModel(path, "is a model's configuration: open the folder that it is in")
    shown = printable(text[:120].decode("utf-8", "replace"))
    raise NotAModel(path, f"is JSON, often a server's error message, not a model: {shown}")


def json_document(source: Source) -> Any:
    """The parsed JSON file. Raises NotAModel if it is not JSON, or too large for a configuration."""
    if source.size > MAX_JSON:
        raise NotAModel(source.path, f"is a text file of {size_text(source.size)}, not a model or its configuration")
    try:
        # Decoded here: Python imports the codec for a byte order mark when it is first used.
        return parse_json(source.data[:].removeprefix(b"\xef\xbb\xbf").decode())
    except ValueError:  # MalformedText, or bytes that are not UTF-8
        raise NotAModel(source.path, "is text but not valid JSON: neither a model nor its configuration") from None


def _is_meta_graph(source: Source) -> bool:
    """Whether it is TensorFlow's `.meta`: a protobuf message of MetaInfoDef (field 1), GraphDef (2) and a few more."""
    numbers = list(_protobuf_fields(source, limit=8))
    return numbers[:2] == [1, 2] and all(1 <= number <= 8 for number in numbers)


def _protobuf_fields(source: Source, limit: int) -> Iterator[int]:
    """The numbers of the first length-delimited fields, up to the first that does not fit into the file."""
    at = 0
    for _ in range(limit):
        if at >= source.size:
            return
        tag = source.mapped[at]
        length = shift = 0
        at += 1
        while at < source.size and shift < 64:
            byte = source.mapped[at]
            at += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        if tag & 7 != 2 or tag >= 0x80 or length > source.size - at:
            return
        yield tag >> 3
        at += length

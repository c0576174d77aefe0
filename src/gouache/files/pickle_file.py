"""Files that torch.save wrote, opened as named tensors: nothing in them is run.

    torch zip      a zip archive of data.pkl, the values, and data/0, data/1, ..., the bytes of the storages
    torch legacy   several pickles, then the storages (`legacy_file`, with torch tar and plain pickles)

The names of the tensors are the keys on the way to them, joined by dots. Where a checkpoint keeps its weights under
`state_dict`, these are the tensors, and optimizer states and the like stand in `extra`, described but not readable.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from gouache.errors import DamagedFile, NotAModel, UnsafeFile, printable
from gouache.files.legacy_file import Unpickled, mentions, read_legacy, read_tar
from gouache.files.pickle_machine import MAX_BYTES
from gouache.files.pickle_names import VOCABULARY, unfold
from gouache.files.pickle_reader import interpret
from gouache.files.pickle_values import Record
from gouache.files.record import ModelFile
from gouache.files.source import Source, size_text, tensor_from
from gouache.files.stored import Storage, StoredTensor, storage_id
from gouache.files.zip_file import Entry, read_zip


def open_pickle(path: str | Path) -> ModelFile:
    """The file as a record, whichever of torch's forms it has. Raises UnsafeFile, DamagedFile or NotAModel."""
    return read_pickle(Source(path))


def read_pickle(source: Source) -> ModelFile:
    """As `open_pickle`, for a file that is open already."""
    if source.data[:4] == b"PK\x03\x04":
        found = _read_zip_form(source)
    elif source.data[257:262] == b"ustar":
        found = read_tar(source)
    else:
        found = read_legacy(source)
    stored, extra = name_tensors(source.path, found.value)

    def read(name: str) -> Any:
        tensor = stored[name]
        if tensor.inline is not None:
            return tensor_from(bytearray(tensor.inline), tensor.offset, tensor.info, tensor.stride, tensor.swap)
        return source.tensor(tensor.offset, tensor.info, tensor.stride, tensor.swap)

    return ModelFile(
        path=source.path,
        format=found.format,
        tensors={name: tensor.info for name, tensor in stored.items()},
        read=read,
        extra=extra,
        notes=found.notes,
        files=(source.path,),
    )


def _read_zip_form(source: Source) -> Unpickled:
    path = source.path
    entries = read_zip(source)
    pickles = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
    if not pickles:
        some = ", ".join(repr(printable(name, 60)) for name in list(entries)[:3])
        raise NotAModel(path, f"is a zip archive ({some or 'empty'}) and no PyTorch file: unpack it first")
    if len(pickles) > 1:
        raise UnsafeFile(path, f"holds {len(pickles)} pickles named data.pkl; which one counts is not defined")
    root = pickles[0].removesuffix("data.pkl")
    if any(name.startswith((f"{root}code/", f"{root}constants.pkl")) for name in entries):
        raise NotAModel(path, "is a TorchScript program, not weights: get the weights as .safetensors")

    pickle = entries[pickles[0]]
    # torch can be told to leave checksums out; then all of them are 0.
    unchecked = all(entry.crc == 0 for entry in entries.values())
    if pickle.size > MAX_BYTES:
        raise UnsafeFile(path, f"its pickle takes {size_text(pickle.size)}; at most {size_text(MAX_BYTES)} make sense")
    end = pickle.offset + pickle.size
    if not unchecked and zlib.crc32(source.data[pickle.offset : end]) != pickle.crc:
        raise DamagedFile(path, "the checksum of its data.pkl is wrong: fetch it again")
    parsed = interpret(path, source.data, pickle.offset, end, VOCABULARY)
    if parsed.end != end:
        raise DamagedFile(path, f"its data.pkl goes on for {end - parsed.end} bytes after its end")

    swap = _is_big_endian(source, entries.get(f"{root}byteorder"))
    dtypes: dict[str, str] = {}

    def find_storage(claim: Any) -> Storage:
        wanted = storage_id(path, claim)
        entry = entries.get(f"{root}data/{wanted.key}") if wanted.key.isdecimal() else None
        if entry is None:
            raise DamagedFile(path, f"lacks the storage {printable(wanted.key, 40)!r} that its pickle refers to")
        if entry.size != wanted.nbytes or dtypes.setdefault(wanted.key, wanted.dtype) != wanted.dtype:
            raise DamagedFile(
                path, f"storage {wanted.key} has {entry.size} bytes, its pickle says {wanted.nbytes} of {wanted.dtype}"
            )
        return wanted.at(entry.offset, swap)

    value = unfold(path, parsed.value, find_storage)
    notes = mentions(parsed) + (("written without checksums",) if unchecked else ())
    return Unpickled(value, "torch zip", notes)


def _is_big_endian(source: Source, entry: Entry | None) -> bool:
    order = source.data[entry.offset : entry.offset + min(entry.size, 8)] if entry else b"little"
    if order not in (b"little", b"big"):
        raise DamagedFile(source.path, "does not say whether it was written on a little- or big-endian machine")
    return order == b"big"


def name_tensors(path: Path, root: Any) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """(tensors by name, everything else by name) of an unpickled value.

    Raises DamagedFile if two tensors would get one name.
    """
    tensors: dict[str, StoredTensor] = {}
    extra: dict[str, Any] = {}

    def collect(value: Any, name: str) -> bool:
        """Whether there is a tensor in `value`; if so, what is no tensor in it went to `extra`."""
        if isinstance(value, StoredTensor):
            name = name or "tensor"
            if name in tensors:
                raise DamagedFile(path, f"two of its tensors are called {printable(name)!r}")
            tensors[name] = value
            return True
        plain: dict[str, Any] = {}
        holds_tensors = False
        for key, item in _children(value):
            inner = f"{name}.{key}" if name else str(key)
            if collect(item, inner):
                holds_tensors = True
            else:
                plain[inner] = item
        if holds_tensors:
            extra.update((inner, _described(item)) for inner, item in plain.items())
        return holds_tensors

    weights = root.get("state_dict") if isinstance(root, dict) else None
    if isinstance(weights, dict) and collect(weights, ""):
        extra |= {str(key): _described(item) for key, item in root.items() if key != "state_dict"}
    elif not collect(root, ""):
        extra |= {str(key): _described(item) for key, item in _children(root)} or {"value": _described(root)}
    return tensors, extra


def _children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple) else []


def _described(value: Any) -> Any:
    """`value` with each tensor in it replaced by its TensorInfo."""
    if isinstance(value, StoredTensor):
        return value.info
    if isinstance(value, dict):
        return {key: _described(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_described(item) for item in value]
    if isinstance(value, tuple):
        return tuple([_described(item) for item in value])
    if isinstance(value, Record):
        return Record(value.name, _described(value.args), _described(value.state))
    return value

"""Opens files that torch.save wrote as named tensors; nothing in them is run.

    torch zip      a zip archive of data.pkl (the values) and data/0, data/1, ... (the bytes of the storages)
    torch legacy   several pickles, then the storages (in `legacy_file`, with torch tar and plain pickles)

A tensor's name is the keys on the path to it, joined by dots. If a checkpoint has its weights under `state_dict`,
only these become tensors; optimizer states and the like go to `extra`, described but not readable.
"""

from __future__ import annotations

import zlib
from functools import partial
from pathlib import Path
from typing import Any

from gouache.errors import DamagedFile, NotAModel, UnsafeFile, printable
from gouache.files.legacy_file import Unpickled, read_legacy, read_tar
from gouache.files.pickle_allow_list import ALLOW_LIST, build_tree
from gouache.files.pickle_machine import MAX_BYTES
from gouache.files.pickle_reader import interpret
from gouache.files.pickle_tree import Record
from gouache.files.record import ModelFile, Reader
from gouache.files.source import Source, size_text, tensor_from
from gouache.files.stored import Storage, StoredTensor, storage_id
from gouache.files.zip_file import Entry, is_torch_script, read_zip, torch_script_error


def open_pickle(path: str | Path, *, everything: bool = False) -> ModelFile:
    """The file as a record, in any of torch's formats. Raises UnsafeFile, DamagedFile or NotAModel.

    `everything`: the tensors of optimizer states and the like can be read too, and all names are those in the pickle
    (`state_dict.NAME`, `optimizer_states.0.state.7.exp_avg`).
    """
    return read_pickle(Source(path), everything=everything)


def read_pickle(source: Source, *, everything: bool = False) -> ModelFile:
    """Same as `open_pickle`, for a file that is already open."""
    if source.data[:4] == b"PK\x03\x04":
        found = _read_zip_form(source)
    elif source.data[257:262] == b"ustar":
        found = read_tar(source)
    else:
        found = read_legacy(source)
    stored, extra = name_tensors(source.path, found.value, everything=everything)
    if not stored:
        raise NotAModel(source.path, f"holds no tensors, so it is not a model (its pickle holds {_kind(found.value)})")

    def read(name: str, mapped: bool = False) -> Any:
        tensor = stored[name]
        if tensor.inline is not None:
            return tensor_from(bytearray(tensor.inline), tensor.offset, tensor.info, tensor.stride, tensor.swap)
        from_file = source.map_tensor if mapped else source.read_tensor
        return from_file(tensor.offset, tensor.info, tensor.stride, tensor.swap)

    return ModelFile(
        path=source.path,
        format=found.format,
        tensors={name: tensor.info for name, tensor in stored.items()},
        read=Reader(read, partial(read, mapped=True)),
        extra=extra,
        notes=found.notes,
        files=(source.path,),
    )


def _kind(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, list | tuple | dict) else type(value).__name__


def _read_zip_form(source: Source) -> Unpickled:
    path = source.path
    entries = read_zip(source)
    pickles = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
    if not pickles:
        some = ", ".join(repr(printable(name, 60)) for name in list(entries)[:3])
        raise NotAModel(path, f"is a zip archive ({some or 'empty'}) but not a PyTorch file: unpack it first")
    if len(pickles) > 1:
        raise UnsafeFile(
            path, f"holds {len(pickles)} pickles named data.pkl; different programs may read different ones"
        )
    root = pickles[0].removesuffix("data.pkl")
    if is_torch_script(entries):
        raise torch_script_error(path)

    pickle = entries[pickles[0]]
    # torch.save can be set to omit checksums; then all of them are 0.
    unchecked = all(entry.crc == 0 for entry in entries.values())
    if pickle.size > MAX_BYTES:
        raise UnsafeFile(path, f"its pickle takes {size_text(pickle.size)}; at most {size_text(MAX_BYTES)} are allowed")
    end = pickle.offset + pickle.size
    if not unchecked and zlib.crc32(source.data[pickle.offset : end]) != pickle.crc:
        raise DamagedFile(path, "the checksum of its data.pkl is wrong: fetch it again")
    parsed = interpret(path, source.mapped, pickle.offset, end, ALLOW_LIST)
    if parsed.end != end:
        raise DamagedFile(path, f"its data.pkl has {end - parsed.end} bytes after the end of the pickle")

    swap = _is_big_endian(source, entries.get(f"{root}byteorder"))
    dtypes: dict[str, str] = {}

    def find_storage(persistent_id: Any) -> Storage:
        storage = storage_id(path, persistent_id)
        key, dtype = storage.key, storage.dtype
        entry = entries.get(f"{root}data/{key}") if key.isdecimal() else None
        if entry is None:
            raise DamagedFile(path, f"has no storage {printable(key, 40)!r}, which its pickle refers to")
        if entry.size != storage.nbytes or dtypes.setdefault(key, dtype) != dtype:
            raise DamagedFile(
                path, f"storage {key} has {entry.size} bytes, but its pickle states {storage.nbytes} bytes of {dtype}"
            )
        return storage.at(entry.offset, swap)

    value = build_tree(path, parsed.value, find_storage)
    notes = ("written without checksums",) if unchecked else ()
    return Unpickled(value, "torch zip", notes)


def _is_big_endian(source: Source, entry: Entry | None) -> bool:
    order = source.data[entry.offset : entry.offset + min(entry.size, 8)] if entry else b"little"
    if order not in (b"little", b"big"):
        raise DamagedFile(source.path, "its entry 'byteorder' is neither 'little' nor 'big'")
    return order == b"big"


def name_tensors(path: Path, root: Any, *, everything: bool = False) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """(tensors by name, all other values by name) of an unpickled value; `everything` as in `open_pickle`.

    Raises DamagedFile if two tensors would have the same name.
    """
    tensors: dict[str, StoredTensor] = {}
    extra: dict[str, Any] = {}

    def collect(value: Any, name: str) -> bool:
        """Whether `value` contains a tensor. If it does, everything else in it is added to `extra`."""
        if isinstance(value, StoredTensor):
            name = name or "tensor"
            if name in tensors:
                raise DamagedFile(path, f"two of its tensors have the name {printable(name)!r}")
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
            extra.update((inner, _without_data(item)) for inner, item in plain.items())
        return holds_tensors

    weights = root.get("state_dict") if isinstance(root, dict) and not everything else None
    if isinstance(weights, dict) and collect(weights, ""):
        extra |= {str(key): _without_data(item) for key, item in root.items() if key != "state_dict"}
    elif not collect(root, ""):
        extra |= {str(key): _without_data(item) for key, item in _children(root)} or {"value": _without_data(root)}
    return tensors, extra


def _children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple) else []


def _without_data(value: Any) -> Any:
    """`value` with each tensor in it replaced by its TensorInfo."""
    if isinstance(value, StoredTensor):
        return value.info
    if isinstance(value, dict):
        return {key: _without_data(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_data(item) for item in value]
    if isinstance(value, tuple):
        return tuple([_without_data(item) for item in value])
    if isinstance(value, Record):
        return Record(value.name, _without_data(value.args), _without_data(value.state))
    return value

"""The formats that torch.save wrote before its zip format, and plain pickles.

    torch legacy (0.1.2 to 1.5)   pickles of a magic number, a version, the writer's machine, the value and the
                                  storage keys; then for each key a count (8 bytes) and the storage's elements
    torch tar (before 0.1.2)      a tar archive of `storages`, `tensors` and `pickle`
    pickle                        one pickle with numpy arrays

The storages of the first two are always little-endian: big-endian machines swapped the bytes when writing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gouache.errors import DamagedFile, FileError, NotAModel, UnsafeFile, printable
from gouache.files.pickle_allow_list import ALLOW_LIST, build_tree
from gouache.files.pickle_machine import Global, type_label
from gouache.files.pickle_reader import interpret
from gouache.files.source import Source, size_text, truncated_error
from gouache.files.stored import STORAGE_TYPES, Storage, StorageId, StoredTensor, storage_id, view

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
HEAD_BUDGET = 64_000  # bytes of each pickle before the value
KEYS_BUDGET = 4_000_000  # bytes of the list of storage keys
MAX_RECORDS = 20_000  # storages, or tensors, of a tar archive; each has a separate small pickle


@dataclass(frozen=True)
class Unpickled:
    """The pickled value as a tree, with `StoredTensor`s for its tensors; the file's format; notes for reports."""

    value: Any
    format: str
    notes: tuple[str, ...] = ()


def read_legacy(source: Source) -> Unpickled:
    """A torch legacy file, or a plain pickle."""
    path, data, size = source.path, source.mapped, source.size
    first = interpret(path, data, 0, size, ALLOW_LIST)
    if type(first.value) is not int or first.value != MAGIC:
        if first.end != size:
            raise DamagedFile(path, f"has {size_text(size - first.end)} after the end of its pickle")
        value = build_tree(path, first.value, lambda persistent_id: _no_storage(source))
        return Unpickled(value, "pickle")

    version = interpret(path, data, first.end, size, ALLOW_LIST, HEAD_BUDGET)
    if type(version.value) is not int or version.value != VERSION:
        raise DamagedFile(path, f"is a torch file of an unknown version (expected {VERSION})")
    machine = interpret(path, data, version.end, size, ALLOW_LIST, HEAD_BUDGET)
    parsed = interpret(path, data, machine.end, size, ALLOW_LIST)
    keys = interpret(path, data, parsed.end, size, ALLOW_LIST, KEYS_BUDGET)

    known_storages: dict[Any, StorageId] = {}
    for reference in parsed.persistent:
        storage = storage_id(path, reference.id)
        first_use = known_storages.setdefault(storage.key, storage)
        if (first_use.dtype, first_use.count) != (storage.dtype, storage.count):
            raise DamagedFile(path, f"its pickle describes storage {printable(storage.key, 40)!r} in two ways")
    listed = keys.value
    if not isinstance(listed, list) or not all(isinstance(key, str) for key in listed):
        raise DamagedFile(path, "has no list of its storages")
    if len(set(listed)) != len(listed) or set(listed) != known_storages.keys():
        raise DamagedFile(path, f"lists {len(listed)} storages, but its pickle refers to {len(known_storages)} others")

    expected = keys.end + sum(8 + storage.nbytes for storage in known_storages.values())
    if expected > size:
        raise truncated_error(path, size, expected)
    if expected < size:
        raise DamagedFile(path, f"has {size_text(size - expected)} after its last storage")
    offsets: dict[Any, int] = {}
    at = keys.end
    for key in listed:
        count, stated = int.from_bytes(data[at : at + 8], "little"), known_storages[key].count
        if count != stated:
            raise DamagedFile(
                path,
                f"storage {printable(key, 40)!r} has {count} elements, but its pickle states {stated}",
            )
        offsets[key] = at + 8
        at += 8 + known_storages[key].nbytes

    def find_storage(persistent_id: Any) -> Storage:
        storage = storage_id(path, persistent_id)
        return storage.at(offsets[storage.key])

    return Unpickled(build_tree(path, parsed.value, find_storage), "torch legacy")


def _no_storage(source: Source) -> Storage:
    raise DamagedFile(source.path, "its pickle refers to tensors that are not in this file")


def read_tar(source: Source) -> Unpickled:
    """A file in torch's tar format."""
    path, data = source.path, source.mapped
    members = _tar_members(source)
    missing = {"storages", "tensors", "pickle"} - members.keys()
    if 0 < len(missing) < 3:
        raise DamagedFile(path, f"ends before its entry {min(missing)!r}: the download is incomplete")
    if missing:
        raise NotAModel(path, "is a tar archive but not a PyTorch file: unpack it first")

    storages: dict[Any, StorageId] = {}
    offsets: dict[Any, int] = {}
    at, end = members["storages"]
    count, at = _count(source, at, end)
    for _ in range(count):
        head = interpret(path, data, at, end, ALLOW_LIST, HEAD_BUDGET)
        key, _, kind = _three(source, head.value)
        dtype = STORAGE_TYPES.get(kind) if isinstance(kind, Global) else None
        if dtype is None:
            raise FileError(path, f"holds a storage of the unsupported type {type_label(kind)}")
        at = head.end + 8
        storage = StorageId(key, dtype, int.from_bytes(data[head.end : at], "little"))
        if storage.nbytes > end - at:
            raise DamagedFile(path, f"ends within its storage {printable(str(key), 40)}: fetch it again")
        storages[key], offsets[key] = storage, at
        at += storage.nbytes
    views = interpret(path, data, at, end, ALLOW_LIST, KEYS_BUDGET)
    if not isinstance(views.value, list):
        raise DamagedFile(path, "has no list of its storage views")
    for part in views.value:
        if not isinstance(part, tuple) or len(part) != 4 or not all(map(_is_key, part)):
            raise DamagedFile(path, "has a damaged list of storage views")
        key, root, first, length = part
        if root not in storages or first + length > storages[root].count:
            raise DamagedFile(path, "has a storage view that reaches outside its storage")
        storages[key] = StorageId(key, storages[root].dtype, storages[root].count, (first, length))
        offsets[key] = offsets[root]

    tensors: dict[int, StoredTensor] = {}
    at, end = members["tensors"]
    count, at = _count(source, at, end)
    for _ in range(count):
        head = interpret(path, data, at, end, ALLOW_LIST, HEAD_BUDGET)
        key, root, _ = _three(source, head.value)
        if not _is_key(root) or root not in storages:
            raise DamagedFile(path, "has a tensor without a storage")
        # The number of dimensions in 4 bytes, 4 unused bytes; then sizes, strides and the offset, 8 bytes each.
        dimensions = int.from_bytes(data[head.end : head.end + 4], "little")
        at = head.end + 8 + 8 * (2 * dimensions + 1)
        if at > end:
            raise DamagedFile(path, "ends within its list of tensors: fetch it again")
        numbers = [int.from_bytes(data[i : i + 8], "little") for i in range(head.end + 8, at, 8)]
        storage = storages[root].at(offsets[root])
        shape, stride = numbers[:dimensions], numbers[dimensions:-1]
        tensors[key] = view(path, storage, storage.dtype, numbers[-1], shape, stride)

    def find_tensor(persistent_id: Any) -> StoredTensor:
        numeric = isinstance(persistent_id, str) and persistent_id.isdecimal() and len(persistent_id) < 30
        key = int(persistent_id) if numeric else persistent_id
        if not _is_key(key) or key not in tensors:
            raise DamagedFile(path, "its pickle refers to a tensor that is not in this file")
        return tensors[key]

    parsed = interpret(path, data, *members["pickle"], ALLOW_LIST)
    return Unpickled(build_tree(path, parsed.value, find_tensor), "torch tar")


def _tar_members(source: Source) -> dict[str, tuple[int, int]]:
    """name -> (first byte, byte after the last) of each regular file of a tar archive in POSIX form."""
    path, data = source.path, source.mapped
    members: dict[str, tuple[int, int]] = {}
    at = 0
    while data[at : at + 1] not in (b"", b"\0") and len(members) < 100:
        header = data[at : at + 512]
        name = header[:100].split(b"\0")[0].decode("ascii", "replace")
        size = header[124:136].strip(b" \0")
        if len(header) < 512 or header[257:262] != b"ustar" or not size.isdigit() or b"8" in size or b"9" in size:
            raise DamagedFile(path, f"its tar archive is damaged at byte {at}")
        start = at + 512
        end = start + int(size, 8)
        if end > source.size:
            raise truncated_error(path, source.size, end)
        if header[156:157] in (b"0", b"\0"):
            if name in members:
                raise UnsafeFile(path, f"holds two tar entries named {printable(name)!r}")
            members[name] = (start, end)
        elif header[156:157] != b"x" or b" path=" in data[start:end] or b" size=" in data[start:end]:
            raise DamagedFile(path, "is a tar archive with special entries; PyTorch never wrote such")
        at = start + -(-(end - start) // 512) * 512
    return members


def _count(source: Source, at: int, end: int) -> tuple[int, int]:
    parsed = interpret(source.path, source.mapped, at, end, ALLOW_LIST, HEAD_BUDGET)
    if type(parsed.value) is not int or not 0 <= parsed.value <= MAX_RECORDS:
        raise DamagedFile(source.path, "does not state how many tensors it holds")
    return parsed.value, parsed.end


def _three(source: Source, value: Any) -> tuple[Any, Any, Any]:
    if not isinstance(value, tuple) or len(value) != 3 or not _is_key(value[0]):
        raise DamagedFile(source.path, "has a damaged list of tensors or storages")
    return value


def _is_key(value: Any) -> bool:
    """Keys were memory addresses. Larger numbers can be chosen to collide as dictionary keys, which takes minutes."""
    return type(value) is int and 0 <= value < 2**64

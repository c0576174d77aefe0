"""Turns the object graph that a pickle built into a tree of plain values.

The graph of `pickle_machine` contains `Call` records; `pickle_allow_list` has the function that computes each result.
A graph can contain itself, or become exponentially large as a tree (a list that holds one list twice, which holds
one list twice, ...). So there are limits on depth, nodes and bytes here, and the users of the tree need none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gouache.errors import DamagedFile, UnsafeFile
from gouache.files.pickle_machine import MAX_NUMBER_KEYS, Call, Global, Persistent, type_label
from gouache.files.record import ITEM_SIZE
from gouache.files.stored import Storage, StoredTensor, view

MAX_DEPTH = 200
MAX_NODES = 500_000
MAX_COPIED = 64_000_000  # bytes that building the tree may copy


@dataclass(frozen=True, slots=True)
class Record:
    """An object of a known harmless class: its constructor arguments and its state. Plain data, never constructed."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None


FindStorage = Callable[[Any], Storage | StoredTensor]
"""From a persistent id, as it is in the pickle, to the storage or tensor it refers to; raises FileError."""


class TreeBuilder:
    """One traversal of one graph; `value(root, 0)` returns the whole tree.

    The tree consists of None, bool, numbers, str, bytes, list, tuple, dict, set, Record and StoredTensor; a global
    that the pickle names without calling it becomes its name as text. Raises UnsafeFile or DamagedFile.
    """

    def __init__(self, path: Path, find_storage: FindStorage, handlers: Mapping[Global, CallHandler]) -> None:
        self.path = path
        self.handlers = handlers
        self.find_storage = find_storage
        self.nodes = self.copied = self.number_keys = 0
        self.open: set[int] = set()  # the nodes between the root and the current one, by identity

    def value(self, node: Any, depth: int) -> Any:
        kind = type(node)
        if kind is Global:
            return str(node)
        if kind is not Call and kind is not list and kind is not tuple and kind is not dict and kind is not Persistent:
            return node
        if depth > MAX_DEPTH:
            raise UnsafeFile(self.path, f"its pickle nests values more than {MAX_DEPTH} levels deep: refused")
        if id(node) in self.open:
            raise UnsafeFile(self.path, "its pickle holds a value that contains itself: refused")
        self.charge(1 if kind is Call or kind is Persistent else 1 + len(node))
        self.open.add(id(node))
        if kind is Call:
            result = self.handlers[node.name](self, node, depth + 1)
        elif kind is dict:
            result = {}
            for key, item in node.items():
                result[self.key(key)] = self.value(item, depth + 1)
        elif kind is Persistent:
            result = self.find_storage(node.id)
            if isinstance(result, Storage):  # a storage saved without a tensor: all of it, as a vector
                count = result.nbytes // ITEM_SIZE[result.dtype]
                result = view(self.path, result, result.dtype, 0, (count,), (1,))
        else:
            result = []
            for item in node:
                result.append(self.value(item, depth + 1))
            if kind is tuple:
                result = tuple(result)
        self.open.discard(id(node))
        return result

    def key(self, key: Any) -> Any:
        if isinstance(key, int | float):
            self.number_keys += 1
            if self.number_keys > MAX_NUMBER_KEYS:
                raise UnsafeFile(self.path, f"uses more than {MAX_NUMBER_KEYS:,} numbers as dictionary keys: refused")
        elif isinstance(key, Global):
            return str(key)
        elif not isinstance(key, str | bytes | None):
            raise UnsafeFile(self.path, "uses a nested value as a dictionary key or in a set: refused")
        return key

    def charge(self, nodes: int, copied: int = 0) -> None:
        self.nodes += nodes
        self.copied += copied
        if self.nodes > MAX_NODES or self.copied > MAX_COPIED:
            raise UnsafeFile(self.path, "its pickle expands to far more than it contains: refused")

    def args(self, call: Call, fewest: int, most: int) -> tuple[Any, ...]:
        """The arguments, filled up with None to `most` of them."""
        if not fewest <= len(call.args) <= most:
            raise self.wrong(call)
        return call.args + (None,) * (most - len(call.args))

    def wrong(self, call: Call) -> DamagedFile:
        return DamagedFile(self.path, f"its pickle calls {type_label(call)} with arguments that PyTorch never writes")

    def bytes_of(self, node: Any, call: Call, depth: int) -> bytes:
        """Bytes, in any of the forms in which pickles have stored them."""
        found = self.value(node, depth)
        if isinstance(found, str):  # a Python 2 string that happened to be UTF-8
            self.charge(1, 4 * len(found))
            found = found.encode("utf-8", "surrogatepass")
        if not isinstance(found, bytes):
            raise self.wrong(call)
        return found


CallHandler = Callable[[TreeBuilder, Call, int], Any]
"""(tree, call, depth) -> the result of the call; it converts the arguments with `tree.value(argument, depth)`."""

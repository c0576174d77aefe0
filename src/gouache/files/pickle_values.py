"""The graph that a pickle built, unfolded into a tree of plain values.

The graph of `pickle_machine` holds `Call` notes; what each stands for is said by the table of `pickle_names`. A graph
can hold itself, or unfold without end (a list of a list twice, of a list twice, ...), so unfolding has budgets of
depth, nodes and bytes, and a consumer of the tree needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gouache.errors import DamagedFile, UnsafeFile
from gouache.files.pickle_machine import MAX_NUMBER_KEYS, Call, Name, Persistent, noun
from gouache.files.record import ITEM_SIZE
from gouache.files.stored import Storage, StoredTensor, view

MAX_DEPTH = 200
MAX_NODES = 500_000
MAX_COPIED = 64_000_000  # bytes that unfolding may copy


@dataclass(frozen=True, slots=True)
class Record:
    """An object of a known harmless class, as what it was made from and the state it was given. Inert."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None


FindStorage = Callable[[Any], Storage | StoredTensor]
"""From a persistent id, as the pickle holds it, to what it stands for; raises FileError."""


class Unfolding:
    """One walk over one graph; `value(root, 0)` is all of it.

    The tree is made of None, bool, numbers, str, bytes, list, tuple, dict, set, Record and StoredTensor; a name that
    the pickle only mentions becomes its text. Raises UnsafeFile or DamagedFile.
    """

    def __init__(self, path: Path, find_storage: FindStorage, meanings: Mapping[Name, Meaning]) -> None:
        self.path = path
        self.meanings = meanings
        self.find_storage = find_storage
        self.nodes = self.copied = self.number_keys = 0
        self.open: set[int] = set()  # the nodes between the root and here, by identity

    def value(self, node: Any, depth: int) -> Any:
        kind = type(node)
        if kind is Name:
            return str(node)
        if kind is not Call and kind is not list and kind is not tuple and kind is not dict and kind is not Persistent:
            return node
        if depth > MAX_DEPTH:
            raise UnsafeFile(self.path, f"its pickle nests values more than {MAX_DEPTH} deep: refused")
        if id(node) in self.open:
            raise UnsafeFile(self.path, "its pickle holds a value that contains itself: refused")
        self.charge(1 if kind is Call or kind is Persistent else 1 + len(node))
        self.open.add(id(node))
        if kind is Call:
            result = self.meanings[node.name](self, node, depth + 1)
        elif kind is dict:
            result = {}
            for key, item in node.items():
                result[self.key(key)] = self.value(item, depth + 1)
        elif kind is Persistent:
            result = self.find_storage(node.id)
            if isinstance(result, Storage):  # a storage saved by itself: all of it, as a vector
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
        elif isinstance(key, Name):
            return str(key)
        elif not isinstance(key, str | bytes | None):
            raise UnsafeFile(self.path, "uses a nested value as a dictionary key or in a set: refused")
        return key

    def charge(self, nodes: int, copied: int = 0) -> None:
        self.nodes += nodes
        self.copied += copied
        if self.nodes > MAX_NODES or self.copied > MAX_COPIED:
            raise UnsafeFile(self.path, "its pickle unfolds to far more than it holds: refused")

    def args(self, call: Call, fewest: int, most: int) -> tuple[Any, ...]:
        """The arguments, `most` of them, missing ones None."""
        if not fewest <= len(call.args) <= most:
            raise self.wrong(call)
        return call.args + (None,) * (most - len(call.args))

    def wrong(self, call: Call) -> DamagedFile:
        return DamagedFile(self.path, f"its pickle uses {noun(call)} as PyTorch never does")

    def bytes_of(self, node: Any, call: Call, depth: int) -> bytes:
        """Bytes, in any of the ways in which pickles have spelt them."""
        found = self.value(node, depth)
        if isinstance(found, str):  # a Python 2 string that happened to be UTF-8
            self.charge(1, 4 * len(found))
            found = found.encode("utf-8", "surrogatepass")
        if not isinstance(found, bytes):
            raise self.wrong(call)
        return found


Meaning = Callable[[Unfolding, Call, int], Any]
"""What a call stands for. Arguments are unfolded through the first argument, at the depth that is the third."""

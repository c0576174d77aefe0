"""ModelFile: an opened weight file or folder as named tensors that are read lazily.

All higher layers (identify, inspect, load, prune, merge) work on a ModelFile and do not depend on the file format.
Names, shapes, dtypes and metadata are known before any weight is read. This module does not import torch, so a
listing takes no longer than starting Python.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gouache.errors import FileError, printable
from gouache.outside import open_outside

if TYPE_CHECKING:
    import torch

# dtype names as in safetensors headers -> bytes per element. The only such table of the package, in the order in which
# the safetensors library stores the tensors of a file: widest first.
ITEM_SIZE = {
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
    "F32": 4, "U32": 4, "I32": 4,
    "BF16": 2, "F16": 2, "U16": 2, "I16": 2,
    "F8_E5M2FNUZ": 1, "F8_E4M3FNUZ": 1, "F8_E8M0": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
# The dtypes that a network computes with; weights of others are codes, of which only their scales make numbers.
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
FP8 = tuple(dtype for dtype in FLOATS if dtype.startswith("F8_"))


_PIECE = 1 << 24  # bytes read at a time


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype (a name of `ITEM_SIZE`) of a tensor, known before it is read."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEM_SIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Reader:
    """How tensors are read by name: a call copies one into memory, `mapped` gives a view of the file where it can.

    A view costs no memory, and ends the process if the file becomes shorter while it is used.
    """

    copied: Callable[[str], torch.Tensor]
    mapped: Callable[[str], torch.Tensor]

    def __call__(self, name: str) -> torch.Tensor:
        return self.copied(name)


@dataclass(frozen=True)
class ModelFile:
    """Named tensors, read lazily, with everything else the file contains.

    `tensors` maps names to `TensorInfo`; for a folder of components the names begin with the component:
    `unet/conv_in.weight`. `metadata` has the text fields of the safetensors header. `extra` has the plain values that
    a pickle stores next to the tensors (`global_step`, `epoch`, ...; a tensor among them is given as its
    `TensorInfo`), and for a diffusers folder the parsed `config.json` files under their relative paths. `notes` are
    remarks for reports: a suffix that contradicts the content, entries that were skipped. `read` copies a tensor into
    memory, `tensor` maps it.
    """

    path: Path
    format: str  # safetensors, torch zip, torch legacy, torch tar, pickle, sharded, component folder, diffusers folder
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], torch.Tensor] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()  # every file on disk that this record reads from

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name` in the dtype of the file; memory-mapped, not copied, where the format allows it."""
        if name not in self.tensors:
            raise FileError(self.path, f"has no tensor named {printable(name)!r}")
        return (self.read.mapped if isinstance(self.read, Reader) else self.read)(name)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def nbytes(self) -> int:
        """Total bytes of all tensors, as stored."""
        return sum(info.nbytes for info in self.tensors.values())

    def sha256(self, on_bytes: Callable[[int], None] | None = None) -> str:
        """The hash that model sites publish: SHA-256 of the file; for several files, of their hashes in name order."""
        digests = [sha256_of(path, on_bytes) for path in sorted(self.files)]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in hexadecimal; `on_bytes` receives the size of each piece read. Raises FileError."""
    digest = hashlib.sha256()
    try:
        with open_outside(path) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
                if on_bytes is not None:
                    on_bytes(len(piece))
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from None
    return digest.hexdigest()

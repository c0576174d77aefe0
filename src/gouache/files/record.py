"""ModelFile: an opened weight file, or folder, as named tensors that are read when asked for.

Everything above this room (identify, inspect, load, prune, merge) starts from a ModelFile and never asks which
format it came from. Names, shapes, dtypes and metadata are known before a byte of weight is read, and this module
imports no torch, so a listing costs no more than Python's own start.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gouache.errors import FileError, printable

if TYPE_CHECKING:
    import torch

# dtype names as in safetensors headers -> bytes an element. The one table of the package, in the order in which the
# safetensors library lays the tensors of a file out: widest first.
ITEM_SIZE = {
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
    "F32": 4, "U32": 4, "I32": 4,
    "BF16": 2, "F16": 2, "U16": 2, "I16": 2,
    "F8_E5M2FNUZ": 1, "F8_E4M3FNUZ": 1, "F8_E8M0": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


_PIECE = 1 << 24  # bytes read at once


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor before it is read: shape, dtype (a name of `ITEM_SIZE`)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class ModelFile:
    """Named tensors, lazily read, with what else the file says.

    `tensors` maps names to `TensorInfo`; for a folder of components the names carry the component in front,
    `unet/conv_in.weight`. `metadata` is the safetensors header's text fields. `extra` holds the plain values that
    stood beside the tensors in a pickle (`global_step`, `epoch`, ...; a tensor among them is its `TensorInfo`), and
    for a diffusers folder the parsed `config.json` files under their relative paths. `notes` are remarks for the
    reader of a report: a suffix that lies, entries that were skipped.
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
        """The tensor `name` with the file's own dtype; mapped, not copied, where the format allows it."""
        if name not in self.tensors:
            raise FileError(self.path, f"holds no tensor named {printable(name)!r}")
        return self.read(name)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, as stored."""
        return sum(info.nbytes for info in self.tensors.values())

    def sha256(self, on_bytes: Callable[[int], None] | None = None) -> str:
        """The hash sites publish: of the file's bytes; for several files, of their hashes in name order."""
        digests = [sha256_of(path, on_bytes) for path in sorted(self.files)]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; `on_bytes` is told how many more are read. Raises FileError."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
                if on_bytes is not None:
                    on_bytes(len(piece))
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from None
    return digest.hexdigest()

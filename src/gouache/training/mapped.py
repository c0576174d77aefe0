"""Weights that are seldom used, moved from memory to a mapped file: the system reads them when they are needed.

When latents and text encodings are cached, the encoders are needed only for samples. In half precision their weights
are private memory, since files rarely have them in that dtype: 0.4 GB for SD1.5.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

ALIGNMENT = 64


def to_disk(networks: Iterable[nn.Module], folder: Path) -> int:
    """Move the weights of `networks` to a file without a name in `folder`; returns how many bytes.

    The system deletes it when the weights or the process are gone. Values, strides and parameters stay the same.
    Nothing is moved from a GPU, if the disk does not have twice the space, or where such files cannot be mapped.
    """
    weights = [each for network in networks for each in network.parameters() if each.device.type == "cpu"]
    sizes = [-(-each.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT for each in weights]
    if os.name != "posix" or not weights or shutil.disk_usage(folder).free < 2 * sum(sizes):
        return 0
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for weight, size in zip(weights, sizes, strict=True):
                storage = torch.empty(0, dtype=torch.uint8).set_(weight.untyped_storage())  # type: ignore[call-overload]
                file.write(storage.numpy().data)
                file.write(bytes(size - storage.numel()))
            file.flush()
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError:
        return 0
    offset = 0
    for weight, size in zip(weights, sizes, strict=True):
        weight.data = _view(data, offset, weight)
        offset += size
    _trim()
    return offset


def _view(data: mmap.mmap, offset: int, like: Tensor) -> Tensor:
    """The tensor that `data` has at `offset` bytes, with the storage, shape and strides of `like`."""
    count = like.untyped_storage().nbytes() // like.element_size()
    values = torch.frombuffer(data, dtype=like.dtype, count=count, offset=offset)
    return values.as_strided(like.shape, like.stride(), like.storage_offset())


def _trim() -> None:
    """Return freed memory to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

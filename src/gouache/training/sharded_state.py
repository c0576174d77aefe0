"""The tensors of a checkpoint in parts, written and read by `torch.distributed.checkpoint`: each process its own.

A group of tensors (weights, averages, optimizer) is a folder of safetensors files, one per process, whose headers say
which rows of each tensor they have. They are read again by any number of processes, also by one alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Read = Callable[[Path], Mapping[str, Tensor]]
"""Reads a group of tensors: a safetensors file, or a folder of parts."""


def write(folder: Path, tensors: Mapping[str, Tensor], sharded: Mapping[str, nn.Parameter]) -> None:
    """Write this process's part of `tensors` into `folder`; all processes must call it.

    A tensor belongs to the parameter of `sharded` whose name it has, perhaps followed by the key of an optimizer's
    state. If it has the shape of this process's part of that parameter, it is a part too.
    """
    dcp = _dcp()

    values = {name: _as_part(tensor, _owner(name, sharded)) for name, tensor in tensors.items()}
    dcp.save(values, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))


def read_whole(path: Path) -> Mapping[str, Tensor]:
    """All tensors, whole."""
    if path.is_file():
        return load_file(path)
    return _load(path, lambda name, size, dtype: torch.empty(size, dtype=dtype))


def reader(sharded: Mapping[str, nn.Parameter], rank: int, size: int) -> Read:
    """Reads the part of process `rank` of `size` of each tensor that belongs to a sharded parameter, others whole."""
    if not sharded:
        return read_whole

    def read(path: Path) -> Mapping[str, Tensor]:
        if path.is_dir():
            return {
                name: tensor.to_local() if hasattr(tensor, "to_local") else tensor
                for name, tensor in _load(path, empty).items()
            }
        return {name: _rows(tensor, _owner(name, sharded), rank, size) for name, tensor in load_file(path).items()}

    def empty(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        owner: Any = _owner(name, sharded)
        if owner is None or owner.shape != shape:
            return torch.empty(shape, dtype=dtype)
        return _as_part(torch.empty(owner.to_local().shape, dtype=dtype, device=owner.device), owner)

    return read


def _load(folder: Path, empty: Callable[[str, torch.Size, torch.dtype], Tensor]) -> dict[str, Any]:
    dcp = _dcp()

    source = dcp.HuggingFaceStorageReader(str(folder))
    values = {
        name: empty(name, each.size, each.properties.dtype)  # type: ignore[union-attr]
        for name, each in source.read_metadata().state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        dcp.load(values, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    return values


def _dcp() -> Any:
    import torch.distributed.checkpoint

    return torch.distributed.checkpoint


def _owner(name: str, sharded: Mapping[str, nn.Parameter]) -> nn.Parameter | None:
    return sharded.get(name) if name in sharded else sharded.get(name.rpartition(".")[0])


def _as_part(tensor: Tensor, owner: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    if owner is None or tensor.shape != owner.to_local().shape:
        return tensor
    return DTensor.from_local(
        tensor.contiguous(), owner.device_mesh, owner.placements, run_check=False, shape=owner.shape,
        stride=torch.empty(owner.shape, device="meta").stride(),
    )  # fmt: skip


def _rows(tensor: Tensor, owner: nn.Parameter | None, rank: int, size: int) -> Tensor:
    if owner is None or owner.shape != tensor.shape:
        return tensor
    parts = tensor.chunk(size)
    return parts[rank] if rank < len(parts) else tensor[:0]

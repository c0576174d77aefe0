"""Files made of files: each function takes a ModelFile and gives another, of which no tensor exists until it is read.

So operations are put one behind another, and what is written at the end passes through all of them a tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from gouache.errors import ModelError, RequestError, printable
from gouache.files.record import ModelFile, TensorInfo
from gouache.layouts.rules import Origin

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2")


def keep(file: ModelFile, names: Iterable[str]) -> ModelFile:
    """`file` with these of its tensors alone, in its own order."""
    wanted = set(names)
    return replace(file, tensors={name: info for name, info in file.tensors.items() if name in wanted})


def rename(file: ModelFile, names: Mapping[str, str]) -> ModelFile:
    """`file` with the tensors that `names` lists, each under what it maps to the old name: {new: old}."""
    return replace(
        file,
        tensors={new: file.tensors[old] for new, old in names.items()},
        read=lambda name: file.read(names[name]),
    )


def arrange(file: ModelFile, origins: Mapping[str, Origin]) -> ModelFile:
    """`file` in another layout: `origins` says where each tensor comes from (`layouts.rules.plan`)."""
    shapes = {name: info.shape for name, info in file.tensors.items()}
    infos = {
        name: TensorInfo(origin.shape(shapes), file.tensors[origin.sources[0]].dtype)
        for name, origin in origins.items()
    }
    return replace(file, tensors=infos, read=lambda name: origins[name].tensor(file.read))


def join(file: ModelFile, *others: ModelFile) -> ModelFile:
    """All tensors of all of them; `file` says everything else. ModelError where two have a name in common."""
    homes: dict[str, ModelFile] = {}
    for each in (file, *others):
        for name in each:
            if name in homes:
                raise ModelError(f"{printable(name)} stands in {printable(str(homes[name].path))} and in {each.path}")
            homes[name] = each
    return replace(
        file,
        tensors={name: home.tensors[name] for name, home in homes.items()},
        read=lambda name: homes[name].read(name),
        files=tuple(dict.fromkeys(path for each in (file, *others) for path in each.files)),
    )


def prefix(file: ModelFile, text: str) -> ModelFile:
    """`file` with `text` in front of each name."""
    return rename(file, {text + name: name for name in file})


def make(file: ModelFile, tensors: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> ModelFile:
    """`file`'s path and metadata with other tensors."""
    return replace(file, tensors=tensors, read=read)


def cast(file: ModelFile, dtype: str | None, exempt: Container[str] = ()) -> ModelFile:
    """`file` with its floating tensors in `dtype` ("fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2"); None leaves them.

    In eight bits stand matrices and filters alone, as in the files that are in use; vectors, of which every value
    counts, are put in float16. ModelError, at the tensor, where a value is too large for the dtype: nothing becomes
    infinite silently.
    """
    if dtype is None:
        return file
    if dtype not in DTYPES:
        raise RequestError("dtype", f"{dtype!r} is not known; use {', '.join(DTYPES)}")
    wanted = DTYPES[dtype]

    def info_of(name: str, info: TensorInfo) -> TensorInfo:
        if info.dtype not in FLOATS or name in exempt:
            return info
        small = wanted in _EIGHT_BITS and len(info.shape) < 2
        return TensorInfo(info.shape, "F16" if small else wanted)

    infos = {name: info_of(name, info) for name, info in file.tensors.items()}
    return replace(file, tensors=infos, read=lambda name: _cast(name, file.read(name), infos[name].dtype))


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: either shows in the extremes, which take a tenth of `isfinite`'s time."""
    import torch

    if tensor.numel() == 0:
        return True
    values = tensor.float() if tensor.itemsize == 1 else tensor  # fp8 has no arithmetic of its own
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(values))


def _cast(name: str, tensor: Tensor, dtype: str) -> Tensor:
    import torch

    from gouache.files.assign import cast as convert
    from gouache.files.source import TORCH_NAMES

    target = getattr(torch, TORCH_NAMES[dtype])
    if not tensor.is_floating_point() or tensor.dtype == target:
        return tensor
    result = convert(tensor, target, "cpu")
    if dtype != "F32" and not all_finite(result) and all_finite(tensor):
        largest = float(tensor.float().abs().max())
        raise ModelError(f"{printable(name)} has values up to {largest:g}, which {dtype} cannot hold; use bf16")
    return result

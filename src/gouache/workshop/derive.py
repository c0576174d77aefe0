"""Derived files: each function takes a ModelFile and returns another, whose tensors are computed when they are read.

Operations can therefore be chained: writing the last file computes one tensor at a time through the whole chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from gouache.errors import ModelError, RequestError, printable
from gouache.files.record import FLOATS, ModelFile, TensorInfo
from gouache.layouts.rules import Origin

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2")


def keep(file: ModelFile, names: Iterable[str]) -> ModelFile:
    """`file` with only the tensors in `names`, in its own order."""
    wanted = set(names)
    return replace(file, tensors={name: info for name, info in file.tensors.items() if name in wanted})


def rename(file: ModelFile, names: Mapping[str, str]) -> ModelFile:
    """`file` with the tensors in `names` ({new name: old name}) under their new names."""
    return replace(
        file,
        tensors={new: file.tensors[old] for new, old in names.items()},
        read=lambda name: file.read(names[name]),
    )


def arrange(file: ModelFile, origins: Mapping[str, Origin]) -> ModelFile:
    """`file` in another layout: `origins` maps each tensor to its sources in `file` (see `layouts.rules.plan`)."""
    shapes = {name: info.shape for name, info in file.tensors.items()}
    infos = {
        name: TensorInfo(origin.shape(shapes), file.tensors[origin.sources[0]].dtype)
        for name, origin in origins.items()
    }
    return replace(file, tensors=infos, read=lambda name: origins[name].tensor(file.read))


def join(file: ModelFile, *others: ModelFile) -> ModelFile:
    """The tensors of all files, with everything else from `file`. ModelError if two files have a name in common."""
    owners: dict[str, ModelFile] = {}
    for each in (file, *others):
        for name in each:
            if name in owners:
                raise ModelError(
                    f"{printable(name)} is in both {printable(str(owners[name].path))} and {printable(str(each.path))}"
                )
            owners[name] = each
    return replace(
        file,
        tensors={name: owner.tensors[name] for name, owner in owners.items()},
        read=lambda name: owners[name].read(name),
        files=tuple(dict.fromkeys(path for each in (file, *others) for path in each.files)),
    )


def prefix(file: ModelFile, text: str) -> ModelFile:
    """`file` with `text` prepended to each name."""
    return rename(file, {text + name: name for name in file})


def make(file: ModelFile, tensors: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> ModelFile:
    """A file with the path and metadata of `file` and other tensors."""
    return replace(file, tensors=tensors, read=read)


def cast(file: ModelFile, dtype: str | None, exempt: Container[str] = ()) -> ModelFile:
    """`file` with its floating-point tensors in `dtype` ("fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2"); None keeps
    their dtypes.

    Only matrices and convolution kernels become fp8, as in common fp8 files; vectors, which are sensitive to rounding,
    become float16. Raises ModelError when a tensor is read that has values too large for the dtype: nothing becomes
    infinite silently.
    """
    if dtype is None:
        return file
    if dtype not in DTYPES:
        raise RequestError("dtype", f"{printable(dtype, 40)!r} is not known; use {', '.join(DTYPES)}")
    wanted = DTYPES[dtype]

    def info_of(name: str, info: TensorInfo) -> TensorInfo:
        if info.dtype not in FLOATS or name in exempt:
            return info
        small = wanted in _EIGHT_BITS and len(info.shape) < 2
        return TensorInfo(info.shape, "F16" if small else wanted)

    infos = {name: info_of(name, info) for name, info in file.tensors.items()}
    return replace(file, tensors=infos, read=lambda name: _cast(name, file.read(name), infos[name].dtype))


# What each dtype can represent exactly, besides itself.
_EXACT: Mapping[str, tuple[str, ...]] = {
    "F64": FLOATS,
    "F32": ("F16", "BF16", *_EIGHT_BITS),
    "BF16": _EIGHT_BITS,
    "F16": _EIGHT_BITS,
}


def is_rounded(before: Mapping[str, TensorInfo], after: Mapping[str, TensorInfo]) -> bool:
    """Whether a cast from the dtypes of `before` to those of `after` can change values."""
    pairs = ((before[name].dtype, info.dtype) for name, info in after.items())
    return any(old != new and old not in _EXACT.get(new, ()) for old, new in pairs)


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. Checks minimum and maximum, which takes a tenth of `isfinite`'s time."""
    import torch

    if tensor.numel() == 0:
        return True
    values = tensor.float() if tensor.itemsize == 1 else tensor  # PyTorch has no arithmetic on fp8
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
        raise ModelError(f"{printable(name)} has values up to {largest:g}, too large for {dtype}; use bf16")
    return result

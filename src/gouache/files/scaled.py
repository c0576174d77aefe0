"""Scaled fp8: weights that are stored as 8-bit floats, each with a scale of its own in another tensor.

An 8-bit float has 3 or 2 bits of fraction and a small range, so tools divide each weight by its largest value first and
store the factor beside it. Such codes look like weights, and used without their scale they give noise. `with_scales`
therefore presents the products, weight times scale, in float32: nothing that reads a `ModelFile` meets the codes.

    layer.weight, layer.scale_weight, scaled_fp8     ComfyUI; `scaled_fp8` marks the file and has no values
    layer.weight, layer.weight_scale                 compressed-tensors, ModelOpt, newer files of ComfyUI
    layer.weight, layer.weight_scale_inv             one scale per block of the weight; multiplied too, despite its name
    layer.scale_input, layer.input_scale             for 8-bit activations, which are not used here
    layer.comfy_quant                                the name of the format, in newer files of ComfyUI
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from gouache.errors import DamagedFile, printable
from gouache.files.record import FP8, ModelFile, Reader, TensorInfo
from gouache.wording import plural

if TYPE_CHECKING:
    import torch

_MARKER = "scaled_fp8"
_FORMAT = "comfy_quant"
_OF_INPUTS = ("scale_input", "input_scale")
_SCALE_DTYPES = ("F64", "F32", "F16", "BF16")


def with_scales(file: ModelFile) -> ModelFile:
    """`file` with its scaled fp8 weights in float32, without their scales and markers. Reads no tensor.

    Raises DamagedFile if a scale does not fit its weight.
    """
    fp8 = [name for name, info in file.tensors.items() if info.dtype in FP8]
    if not fp8:
        return file
    scales = {name: scale for name in fp8 for scale in _scale_names(name) if scale in file.tensors}
    for name, scale in scales.items():
        _check(file, name, scale)
    formats = {f"{name.removesuffix('.weight')}.{_FORMAT}" for name in fp8}
    described = (_MARKER, *_OF_INPUTS) if scales else (_MARKER,)
    hidden = {name for name in file if name in formats or name.rpartition(".")[2] in described} | {*scales.values()}
    if not hidden:
        return file
    tensors = {
        name: TensorInfo(info.shape, "F32") if name in scales else info
        for name, info in file.tensors.items()
        if name not in hidden
    }

    def read(name: str) -> torch.Tensor:
        stored = file.read(name)
        return _product(stored, file.read(scales[name])) if name in scales else stored

    def mapped(name: str) -> torch.Tensor:
        return read(name) if name in scales else file.tensor(name)

    before, after = (
        sum(each.tensors[name].nbytes for name in scales) for each in (file, replace(file, tensors=tensors))
    )
    note = (
        f"scaled fp8: {plural(len(scales), 'weight')} multiplied by the scales in the file, which gives float32: "
        f"{after / 1e6:,.1f} MB for {before / 1e6:,.1f} MB"
    )
    notes = (*file.notes, note) if scales else file.notes
    return replace(file, tensors=tensors, read=Reader(read, mapped), notes=notes)


def _scale_names(name: str) -> Iterator[str]:
    stem = name.removesuffix(".weight")
    if stem != name:
        yield f"{stem}.scale_weight"
    yield from (f"{name}_scale", f"{name}_scale_inv", f"{name}.scale")


def _check(file: ModelFile, name: str, scale: str) -> None:
    """A scale is one number, or one per row, or one per block of a matrix."""
    weight, info = file.tensors[name].shape, file.tensors[scale]
    one = info.elements == 1
    row = bool(weight) and info.elements == weight[0] == (info.shape or (0,))[0]
    block = len(info.shape) == len(weight) == 2 and all(map(_block_length, weight, info.shape))
    if info.dtype not in _SCALE_DTYPES or not (one or row or block):
        raise DamagedFile(
            file.path,
            f"the fp8 tensor {printable(name)} has shape {list(weight)}, and its scale {printable(scale)} has shape "
            f"{list(info.shape)} and dtype {info.dtype}: expected one number, or one per row or block",
        )


def _product(stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    weight, scale = stored.float(), scale.float()
    if scale.numel() == 1:
        return weight * scale.reshape(())
    if scale.numel() == weight.shape[0]:
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    for axis, (count, length) in enumerate(zip(scale.shape, weight.shape)):
        scale = scale.repeat_interleave(_block_length(length, count), axis).narrow(axis, 0, length)
    return weight * scale


def _block_length(length: int, count: int) -> int:
    """The length of each of `count` blocks of `length` rows, of which the last may be shorter; 0 if there is none.

    Blocks are a power of two long, 128 in most files, so that a single length fits.
    """
    if count in (1, length):
        return length // count
    return next((size for size in (2**n for n in range(1, 13)) if math.ceil(length / size) == count), 0)

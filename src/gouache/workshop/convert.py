"""Any readable file or folder -> one .safetensors file, a tensor at a time.

A diffusers folder becomes a single file in the original names, which every other tool reads; a single file keeps its
names. Nothing of the source is run, and the target appears whole or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gouache.errors import ModelError, RequestError, printable
from gouache.families.found import Component, Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile, TensorInfo
from gouache.files.write import stream_safetensors
from gouache.layouts.rules import Origin, Rename, invert, plan
from gouache.layouts.text import OPENCLIP

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
    "svd": "stable-video-diffusion-img2vid-v1",
}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Converted:
    """What was written: `tensors`, `nbytes` of them, in which `layout`; `left_out` counts the rest by reason."""

    tensors: int
    nbytes: int
    layout: str
    left_out: Mapping[str, int]


def convert(source: Path, target: Path, *, dtype: str | None = None, overwrite: bool = False) -> Converted:
    """Write `source` as the safetensors file `target`. `dtype` ("fp32", "bf16", "fp16") casts floating tensors.

    Raises FileError where the source cannot be read or the target not written, RequestError for a target that exists
    or is no .safetensors, ModelError for a folder whose family is not known.
    """
    if target.suffix.lower() != ".safetensors":
        raise RequestError("out", f"{target} does not end in .safetensors, which is what is written")
    if target.exists() and not overwrite:
        raise RequestError("out", f"{target} exists already; give another name, or --overwrite")
    if dtype is not None and dtype not in DTYPES:
        raise RequestError("dtype", f"{dtype!r} is not known; use {', '.join(DTYPES)}")
    file = open_model(source)
    if not len(file):
        raise ModelError(f"{printable(str(source))} holds no tensors; there is nothing to convert")
    found = identify(file)
    folder = found.kind.value == "diffusers folder"
    tensors = (
        _single_file(file, found)
        if folder
        else {name: _Tensor(info, file.tensor) for name, info in file.tensors.items()}
    )
    infos = {name: _cast(each.info, dtype) for name, each in tensors.items()}

    def read(name: str) -> Tensor:
        import torch

        from gouache.files.assign import cast
        from gouache.files.source import TORCH_NAMES

        return cast(tensors[name].read(name), getattr(torch, TORCH_NAMES[infos[name].dtype]), "cpu")

    stream_safetensors(target, infos, read, {**_described(found), **file.metadata})
    left_out = Counter(found.leftovers[name] for name in found.leftovers) if folder else Counter[str]()
    nbytes = sum(info.nbytes for info in infos.values())
    return Converted(len(infos), nbytes, "original single-file names" if folder else "names kept", left_out)


@dataclass(frozen=True)
class _Tensor:
    info: TensorInfo
    read: Callable[[str], Tensor]


def _single_file(file: ModelFile, found: Found) -> dict[str, _Tensor]:
    """A folder's components under the names and prefixes that single files of its family have."""
    family = found.family.value
    if family is None:
        raise ModelError(f"{printable(str(file.path))}: the family cannot be told ({found.family.evidence})")
    tensors: dict[str, _Tensor] = {}
    for place in family.places:
        component = found.component(place.component)
        rules = invert(OPENCLIP) if place.layout == "openclip" else (Rename("{name*}", "{name*}"),)
        for name, origin in plan(rules, component.origins).origins.items():
            tensors[place.prefix + name] = _renamed(file, component, origin)
    return tensors


def _renamed(file: ModelFile, component: Component, origin: Origin) -> _Tensor:
    """One tensor, through the component's own table into the network's names, and from there into the file's."""
    stored = {name: info.shape for name, info in file.tensors.items()}
    inner = {name: component.origins[name] for name in origin.sources}
    shape = origin.shape({name: each.shape(stored) for name, each in inner.items()})
    dtype = file.tensors[inner[origin.sources[0]].sources[0]].dtype
    return _Tensor(
        TensorInfo(shape, dtype), lambda _: origin.tensor(lambda name: inner[name].tensor(file.tensor)).contiguous()
    )


def _cast(info: TensorInfo, dtype: str | None) -> TensorInfo:
    if dtype is None or info.dtype not in FLOATS:
        return info
    return TensorInfo(info.shape, DTYPES[dtype])


def _described(found: Found) -> dict[str, str]:
    """What the names of the tensors do not say, in the words other tools use, so that the next reader need not guess.

    What is itself no more than a guess stays out.
    """
    family = found.family.value
    if family is None or found.prediction is None or family.name not in ARCHITECTURES:
        return {}
    said = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURES[family.name],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": found.path.stem,
    }
    if found.prediction.sure != "guess":
        said["modelspec.prediction_type"] = "v" if found.prediction.value == "v" else "epsilon"
    if found.size is not None and found.size.sure == "certain":
        said["modelspec.resolution"] = "x".join(map(str, found.size.value))
    if found.zero_snr is not None and found.zero_snr.value:
        said["ss_zero_terminal_snr"] = "True"
    return said

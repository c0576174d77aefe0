"""ModelFile records without files: of the official key lists, and of narrow models with the same topology."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gouache.families.family import Family
from gouache.files.record import ModelFile, TensorInfo
from gouache.layouts.original import text_shapes, unet_shapes, vae_shapes
from gouache.layouts.rules import Shape, invert, plan
from gouache.layouts.text import OPENCLIP
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec

KEYS = Path(__file__).parent.parent / "keys"


def manifest(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes()))


def record(
    tensors: Mapping[str, TensorInfo],
    values: Mapping[str, torch.Tensor] | None = None,
    *,
    path: Path = Path("/models/model.safetensors"),
    format: str = "safetensors",
    **rest: Any,
) -> ModelFile:
    """A record of which only the tensors in `values` can be read."""

    def read(name: str) -> torch.Tensor:
        assert name in (values or {}), f"{name} was read, although only names and shapes are needed"
        return (values or {})[name]

    return ModelFile(path=path, format=format, tensors=dict(tensors), read=read, **rest)


def official(name: str) -> dict[str, TensorInfo]:
    return {key: TensorInfo(tuple(shape), dtype) for key, (shape, dtype) in manifest(name).items()}


def official_folder(name: str) -> ModelFile:
    """The record of an official diffusers folder, as `files.open` makes it."""
    parts = manifest(name)
    tensors, extra = {}, {}
    for part, content in parts.items():
        if isinstance(content, dict) and "tensors" in content:
            extra[f"{part}/config.json"] = content["config"]
            for key, (shape, dtype) in content["tensors"].items():
                tensors[f"{part}/{key}"] = TensorInfo(tuple(shape), dtype)
    extra["model_index.json"] = parts["model_index"]
    extra["scheduler/scheduler_config.json"] = parts["scheduler"]
    return record(tensors, format="diffusers folder", path=Path("/models/folder"), extra=extra)


def infos(shapes: Mapping[str, Shape], prefix: str = "", dtype: str = "F32") -> dict[str, TensorInfo]:
    return {prefix + name: TensorInfo(shape, dtype) for name, shape in shapes.items()}


def openclip_shapes(spec: TextSpec) -> dict[str, Shape]:
    """The shapes of a text encoder under OpenCLIP's names."""
    ours = text_shapes(spec)
    return {name: origin.shape(ours) for name, origin in plan(invert(OPENCLIP), ours).origins.items()}


def narrow(family: Family, unet: UNetSpec, text: TextSpec | None = None) -> dict[str, TensorInfo]:
    """A single file of `family` with a U-Net of this spec, a narrow autoencoder and narrow text encoders."""
    text = text or TextSpec(width=64, layers=3, heads=1, mlp_width=96, vocabulary=99, positions=12)
    tensors: dict[str, TensorInfo] = {}
    for location in family.locations:
        if location.component == "unet":
            tensors |= infos(unet_shapes(unet), location.prefix)
        elif location.component == "vae":
            tensors |= infos(vae_shapes(VaeSpec(channels=32, channel_mult=(1, 2), res_blocks=1)), location.prefix)
        elif location.layout == "openclip":
            spec = TextSpec(width=128, layers=3, heads=2, mlp_width=96, vocabulary=99, positions=12, projection=48)
            tensors |= infos(openclip_shapes(spec), location.prefix)
        else:
            tensors |= infos(text_shapes(text), location.prefix)
    return tensors

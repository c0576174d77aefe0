"""An embedding as a file: .safetensors under the names of kohya's scripts, or the .pt of AUTOMATIC1111's web UI."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gouache.errors import RequestError
from gouache.files.write import write_atomic, write_new
from gouache.workshop import save

_NAMES_OF_SDXL = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_TOKEN = 265  # of "*", the placeholder in A1111's files


def export_embedding(
    vectors: Mapping[str, Tensor], path: Path, word: str, metadata: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """Write {encoder: (vectors, width)} in float32. Raises RequestError for another suffix."""
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".pt"):
        raise RequestError(
            "output", f"{save.shown(path)} does not end in .safetensors or .pt, the formats of embeddings"
        )
    named = tensors_of(vectors)
    if suffix == ".safetensors":
        save.write_tensors(path, named, {**metadata, "sshs_model_hash": ""}, overwrite=overwrite)
        return
    steps = metadata.get("ss_steps", "")
    value: dict[str, Any] = named
    if len(vectors) == 1:
        value = {
            "string_to_token": {"*": _TOKEN},
            "string_to_param": {"*": next(iter(named.values()))},
            "name": word,
            "step": int(steps) if steps.isdecimal() else None,
            "sd_checkpoint": None,
            "sd_checkpoint_name": metadata.get("ss_sd_model_name"),
        }
    write_pickle(path, value, overwrite=overwrite)


def tensors_of(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vectors under the names that files have: emb_params, or clip_l and clip_g for SDXL."""
    if len(vectors) == 1:
        return {"emb_params": next(iter(vectors.values())).contiguous()}
    return {_NAMES_OF_SDXL[encoder]: each.contiguous() for encoder, each in vectors.items()}


def write_pickle(path: Path, value: Mapping[Any, Any], *, overwrite: bool) -> None:
    """Write plain values and tensors as torch.save does, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(dict(value), buffer)
    with save.writing(path, overwrite):
        (write_atomic if overwrite else write_new)(path, buffer.getvalue())

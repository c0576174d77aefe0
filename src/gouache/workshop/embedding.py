"""Combine textual inversions: concatenate their vectors, or average them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gouache.adapters.embedding import vectors_of
from gouache.errors import ModelError, RequestError, printable
from gouache.files.open import open_model
from gouache.workshop import save

How = Literal["join", "mean"]


@dataclass(frozen=True)
class Combined:
    """What was written: the number of vectors, and {text encoder: width of its vectors}."""

    vectors: int
    widths: Mapping[str, int]


def combine(
    embeddings: Sequence[tuple[Path, float]], target: Path, how: str = "join", *, overwrite: bool = False
) -> Combined:
    """Write several embeddings as one. `how` "join" concatenates all vectors, each multiplied by its strength. "mean"
    averages the first vectors, the second ones, and so on, weighted by the strengths; an embedding with fewer vectors
    takes part in fewer means.

    Raises RequestError for invalid settings, ModelError for embeddings of different widths.
    """
    if how not in ("join", "mean"):
        raise RequestError("how", f"{printable(how, 40)!r} is not known; use join or mean")
    if len(embeddings) < 2:
        raise RequestError("embeddings", "name at least two embeddings to combine")
    if target.suffix.lower() != ".safetensors":
        raise RequestError(
            "out", f"{save.shown(target)} does not end in .safetensors, the only format embeddings are written in"
        )
    save.check_target(target, overwrite)
    read = [(vectors_of(open_model(path)), strength, path) for path, strength in embeddings]
    widths = {encoder: each.shape[1] for encoder, each in read[0][0].items()}
    for vectors, _, path in read[1:]:
        if (other := {encoder: each.shape[1] for encoder, each in vectors.items()}) != widths:
            raise ModelError(
                f"{save.shown(path)} has vectors of width {_listed(other)} and {save.shown(read[0][2])} of width "
                f"{_listed(widths)}: they are for different models"
            )
    combined = {encoder: _combined([(v[encoder], strength) for v, strength, _ in read], how) for encoder in widths}
    names = (
        {"text_encoder": "clip_l", "text_encoder_2": "clip_g"} if len(widths) > 1 else {"text_encoder": "emb_params"}
    )
    metadata = {"modelspec.sai_model_spec": "1.0.1", "modelspec.title": target.stem,
                "modelspec.merged_from": ", ".join(path.stem for path, _ in embeddings)}  # fmt: skip
    tensors = {names[encoder]: each.contiguous() for encoder, each in combined.items()}
    save.write_tensors(target, tensors, metadata, overwrite=overwrite)
    return Combined(next(iter(combined.values())).shape[0], widths)


def _combined(parts: Sequence[tuple[Tensor, float]], how: str) -> Tensor:
    if how == "join":
        return torch.cat([vectors * strength for vectors, strength in parts])
    rows = []
    for index in range(max(len(vectors) for vectors, _ in parts)):
        row_parts = [(vectors[index], strength) for vectors, strength in parts if index < len(vectors)]
        total = sum(strength for _, strength in row_parts)
        if not total:
            raise RequestError("strength", "the strengths add up to 0, so there is no weighted mean; change one")
        rows.append(torch.stack([row * strength for row, strength in row_parts]).sum(0) / total)
    return torch.stack(rows)


def _listed(widths: Mapping[str, int]) -> str:
    return " and ".join(map(str, widths.values()))

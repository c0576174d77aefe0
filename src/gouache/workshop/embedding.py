"""Textual inversions combined: vectors of several, one behind another, or mixed into as many as one has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gouache.adapters.embedding import vectors_of
from gouache.errors import ModelError, RequestError
from gouache.files.open import open_model
from gouache.files.write import write_safetensors
from gouache.workshop import save

How = Literal["join", "mean"]


@dataclass(frozen=True)
class Combined:
    """What was written: how many vectors, and how wide, for each encoder."""

    vectors: int
    widths: Mapping[str, int]


def combine(
    embeddings: Sequence[tuple[Path, float]], target: Path, how: str = "join", *, overwrite: bool = False
) -> Combined:
    """Write several embeddings as one. "join": all vectors in turn, each times its strength. "mean": the mean of the
    first vectors, of the second ones, ..., weighted by the strengths; shorter ones end earlier.

    Raises RequestError for settings, ModelError for embeddings of different widths.
    """
    if how not in ("join", "mean"):
        raise RequestError("how", f"{how!r} is not known; use join or mean")
    if len(embeddings) < 2:
        raise RequestError("embeddings", "name at least two to combine")
    if target.suffix.lower() != ".safetensors":
        raise RequestError("out", f"{target} does not end in .safetensors, which is what embeddings are written as")
    save.refuse_existing(target, overwrite)
    read = [(vectors_of(open_model(path)), strength, path) for path, strength in embeddings]
    widths = {encoder: each.shape[1] for encoder, each in read[0][0].items()}
    for vectors, _, path in read[1:]:
        if (other := {encoder: each.shape[1] for encoder, each in vectors.items()}) != widths:
            raise ModelError(
                f"{path} is {_wide(other)} wide, and {read[0][2]} is {_wide(widths)} wide: for different models"
            )
    made = {encoder: _combined([(v[encoder], strength) for v, strength, _ in read], how) for encoder in widths}
    names = (
        {"text_encoder": "clip_l", "text_encoder_2": "clip_g"} if len(widths) > 1 else {"text_encoder": "emb_params"}
    )
    said = {"modelspec.sai_model_spec": "1.0.1", "modelspec.title": target.stem,
            "modelspec.merged_from": ", ".join(path.stem for path, _ in embeddings)}  # fmt: skip
    write_safetensors(target, {names[encoder]: each.contiguous() for encoder, each in made.items()}, said)
    return Combined(next(iter(made.values())).shape[0], widths)


def _combined(parts: Sequence[tuple[Tensor, float]], how: str) -> Tensor:
    if how == "join":
        return torch.cat([vectors * strength for vectors, strength in parts])
    rows = []
    for index in range(max(len(vectors) for vectors, _ in parts)):
        here = [(vectors[index], strength) for vectors, strength in parts if index < len(vectors)]
        total = sum(strength for _, strength in here)
        if not total:
            raise RequestError("strength", "the strengths add up to 0, of which there is no mean")
        rows.append(torch.stack([row * strength for row, strength in here]).sum(0) / total)
    return torch.stack(rows)


def _wide(widths: Mapping[str, int]) -> str:
    return " and ".join(map(str, widths.values()))

"""Textual inversions (Gal et al. 2022): vectors that stand in for words a text encoder never had."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gouache.errors import ModelError, printable
from gouache.files.record import ModelFile
from gouache.layouts.adapters import BUNDLED, read_embedding

Vectors = Mapping[str, Tensor]
"""{encoder: (vectors, width)}, float32; encoders are "text_encoder" and, for SDXL, "text_encoder_2"."""


def vectors_of(file: ModelFile) -> dict[str, Tensor]:
    """The vectors of an embedding file in any of the forms in use.

    Raises ModelError for a file that is none, or whose vectors are not finite.
    """
    shapes = {name: info.shape for name, info in file.tensors.items()}
    if read_embedding(shapes, file.extra) is None:
        raise ModelError(
            f"{printable(str(file.path))} is no embedding: its tensors are not those of a textual inversion"
        )
    return _vectors(file, {name: name for name in file})


def bundled_vectors(file: ModelFile, names: list[str]) -> dict[str, Tensor]:
    """The vectors of an embedding that a LoRA brings along, of which `names` are the tensors."""
    return _vectors(file, {name.removeprefix(BUNDLED).partition(".")[2]: name for name in names})


def _vectors(file: ModelFile, names: Mapping[str, str]) -> dict[str, Tensor]:
    if {"clip_l", "clip_g"} & set(names):
        named = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
        found = {encoder: names[name] for encoder, name in named.items() if name in names}
    else:
        first = next((name for name in names if name.startswith("string_to_param.")), next(iter(names)))
        found = {"text_encoder": names[first]}
    vectors = {encoder: file.tensor(name).float() for encoder, name in found.items()}
    vectors = {encoder: each[None] if each.ndim == 1 else each for encoder, each in vectors.items()}
    if not all(bool(torch.isfinite(each).all()) for each in vectors.values()):
        raise ModelError(f"{printable(str(file.path))} is damaged: its vectors hold NaN or infinite numbers")
    return vectors


def must_fit(file: ModelFile, vectors: Vectors, widths: Mapping[str, int]) -> None:
    """Raises ModelError where the vectors are not for text encoders of these widths.

    SDXL's refiner, which has the second encoder alone, takes what SDXL's embeddings have for that one.
    """
    told = {encoder: each.shape[1] for encoder, each in vectors.items()}
    if told == widths or (set(widths) == {"text_encoder_2"} and told.get("text_encoder_2") == widths["text_encoder_2"]):
        return
    have, want = (" and ".join(str(width) for width in each.values()) for each in (told, widths))
    raise ModelError(
        f"{printable(str(file.path))} has vectors {have} wide, and this model reads prompts as vectors {want} wide; "
        f"{_fits(told)}"
    )


def _fits(widths: Mapping[str, int]) -> str:
    lines = {(768,): "they fit Stable Diffusion 1", (1024,): "they fit Stable Diffusion 2",
             (768, 1280): "they fit SDXL", (1280,): "they fit SDXL's second encoder alone"}  # fmt: skip
    return lines.get(tuple(widths.values()), "they fit none of the known families")

"""Textual inversion (Gal et al. 2022): vectors that replace token embeddings where a name occurs in a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from gouache.errors import ModelError, printable
from gouache.files.record import ModelFile
from gouache.layouts.adapters import SDXL_VECTORS, bundled_name, embedding_entries, read_embedding

MOST = 75  # vectors, the size of a prompt's chunk

Vectors = Mapping[str, Tensor]
"""{encoder: (vectors, width)}, float32; encoders are "text_encoder" and, for SDXL, "text_encoder_2"."""


def vectors_of(file: ModelFile) -> dict[str, Tensor]:
    """The vectors of an embedding file in any known form.

    Raises ModelError if the file is not an embedding, or its vectors are not finite.
    """
    shapes = {name: info.shape for name, info in file.tensors.items()}
    if read_embedding(shapes, file.extra) is None:
        raise ModelError(
            f"{printable(str(file.path))} is not an embedding: its tensors are not those of a textual inversion"
        )
    return _vectors(file, {name: name for name in file})


def bundled_vectors(file: ModelFile, names: list[str]) -> dict[str, Tensor]:
    """The vectors of an embedding bundled in a LoRA; `names` are its tensors."""
    return _vectors(file, {parts[1]: name for name in names if (parts := bundled_name(name)) is not None})


def _vectors(file: ModelFile, names: Mapping[str, str]) -> dict[str, Tensor]:
    where = printable(str(file.path))
    found = {SDXL_VECTORS[name]: names[name] for name in SDXL_VECTORS if name in names}
    if not found:
        entries = embedding_entries(name for name in names if file.tensors[names[name]].shape not in ((), (1,)))
        if len(entries) != 1:
            listed = ", ".join(printable(name.removeprefix("string_to_param."), 40) for name in entries[:5])
            raise ModelError(
                f"{where} holds {len(entries)} embeddings ({listed}), expected one; save each in a file of its own"
            )
        found = {"text_encoder": names[entries[0]]}
    vectors = {encoder: file.tensor(name).float() for encoder, name in found.items()}
    vectors = {encoder: each[None] if each.ndim == 1 else each for encoder, each in vectors.items()}
    shapes = [list(each.shape) for each in vectors.values()]
    counts = {shape[0] if len(shape) == 2 else 0 for shape in shapes}
    if len(counts) != 1 or not 1 <= max(counts) <= MOST:
        found_shapes = " and ".join(map(str, shapes))
        raise ModelError(
            f"{where} cannot be used as an embedding: it holds {found_shapes}, expected 1 to {MOST} vectors"
        )
    if not all(bool(torch.isfinite(each).all()) for each in vectors.values()):
        raise ModelError(f"{where} is damaged: its vectors hold NaN or infinite numbers")
    return vectors


class Embeddings(Mapping[str, Vectors]):
    """The embeddings that prompts can use, by name; of several with one name, the one added last."""

    def __init__(self) -> None:
        self._all: list[tuple[str, Vectors]] = []

    def add(self, name: str, vectors: Vectors) -> Callable[[], None]:
        """Add an embedding; the returned function removes it."""
        entry = (name, vectors)
        self._all.append(entry)

        def remove() -> None:
            self._all = [each for each in self._all if each is not entry]

        return remove

    def __getitem__(self, name: str) -> Vectors:
        for each, vectors in reversed(self._all):
            if each == name:
                return vectors
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for name, _ in self._all))

    def __len__(self) -> int:
        return len({name for name, _ in self._all})


def fits(vectors: Mapping[str, int], widths: Mapping[str, int]) -> bool:
    """Whether vectors of these widths, by encoder, are for text encoders of these `widths`.

    SDXL's refiner, which has only the second encoder, uses the vectors that SDXL's embeddings have for it.
    """
    if set(widths) == {"text_encoder_2"}:
        return vectors.get("text_encoder_2") == widths["text_encoder_2"]
    return vectors == widths


def check_widths(file: ModelFile, vectors: Vectors, widths: Mapping[str, int]) -> None:
    """Raises ModelError if the vectors are not for text encoders of these widths."""
    own = {encoder: each.shape[1] for encoder, each in vectors.items()}
    if fits(own, widths):
        return
    have, want = (" and ".join(str(width) for width in each.values()) for each in (own, widths))
    raise ModelError(
        f"{printable(str(file.path))} has vectors of width {have}, but this model's text encoders have width {want}; "
        f"{_families(own)}"
    )


def _families(widths: Mapping[str, int]) -> str:
    lines = {(768,): "they fit Stable Diffusion 1", (1024,): "they fit Stable Diffusion 2",
             (768, 1280): "they fit SDXL", (1280,): "they fit SDXL's second encoder only"}  # fmt: skip
    return lines.get(tuple(widths.values()), "they fit none of the known families")

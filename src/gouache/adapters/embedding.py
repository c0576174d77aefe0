"""Textual inversions (Gal et al. 2022): vectors that stand in for words a text encoder never had."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from gouache.errors import ModelError, printable
from gouache.files.record import ModelFile
from gouache.layouts.adapters import BUNDLED, SDXL_VECTORS, read_embedding

MOST = 75  # vectors, which is what a prompt's chunk has room for

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
    found = {SDXL_VECTORS[name]: names[name] for name in SDXL_VECTORS if name in names}
    if not found:
        first = next((name for name in names if name.startswith("string_to_param.")), next(iter(names)))
        found = {"text_encoder": names[first]}
    where = printable(str(file.path))
    vectors = {encoder: file.tensor(name).float() for encoder, name in found.items()}
    vectors = {encoder: each[None] if each.ndim == 1 else each for encoder, each in vectors.items()}
    shapes = [list(each.shape) for each in vectors.values()]
    counts = {shape[0] if len(shape) == 2 else 0 for shape in shapes}
    if len(counts) != 1 or not 1 <= max(counts) <= MOST:
        told = " and ".join(map(str, shapes))
        raise ModelError(f"{where} is no embedding that can be used: it holds {told}, expected 1 to {MOST} vectors")
    if not all(bool(torch.isfinite(each).all()) for each in vectors.values()):
        raise ModelError(f"{where} is damaged: its vectors hold NaN or infinite numbers")
    return vectors


class Words(Mapping[str, Vectors]):
    """The embeddings that prompts can use, by name; of several of one name the last that is still there."""

    def __init__(self) -> None:
        self._all: list[tuple[str, Vectors]] = []

    def add(self, name: str, vectors: Vectors) -> Callable[[], None]:
        """Make `name` stand for `vectors`, until what is returned is called."""
        entry = (name, vectors)
        self._all.append(entry)

        def remove() -> None:
            self._all = [each for each in self._all if each is not entry]

        return remove

    def __getitem__(self, name: str) -> Vectors:
        for word, vectors in reversed(self._all):
            if word == name:
                return vectors
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(word for word, _ in self._all))

    def __len__(self) -> int:
        return len({word for word, _ in self._all})


def fits(told: Mapping[str, int], widths: Mapping[str, int]) -> bool:
    """Whether vectors `told` wide, by encoder, are for text encoders of these widths.

    SDXL's refiner, which has the second encoder alone, takes what SDXL's embeddings have for that one.
    """
    if set(widths) == {"text_encoder_2"}:
        return told.get("text_encoder_2") == widths["text_encoder_2"]
    return told == widths


def must_fit(file: ModelFile, vectors: Vectors, widths: Mapping[str, int]) -> None:
    """Raises ModelError where the vectors are not for text encoders of these widths."""
    told = {encoder: each.shape[1] for encoder, each in vectors.items()}
    if fits(told, widths):
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

"""Textual inversion (Gal et al. 2022) as the target of a run: vectors for a new word; the model keeps its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gouache.adapters.embedding import MOST, Vectors
from gouache.errors import RequestError, printable
from gouache.model.model import Model
from gouache.nn import products
from gouache.nn.clip_text import ClipText
from gouache.prompts.chunks import chunk
from gouache.training.objective import Group, Json
from gouache.training.targets.export import Averages, model_metadata
from gouache.training.targets.export_embedding import export_embedding

NETWORK = "embedding"  # precedes the names of vectors in checkpoints
_SYNTAX = r"()[]{}|\<>:#"  # what prompts, or programs that fill them in, do not read as text


@dataclass(frozen=True)
class EmbeddingOptions:
    """`word` is what prompts say, `vectors` how many tokens it takes there, `start` the words whose vectors it begins
    with, `rate` the factor of its learning rate. Raises RequestError for a word that prompts cannot say, or an
    impossible number of vectors.
    """

    word: str
    vectors: int = 1
    start: str = "*"
    rate: float = 1.0

    @property
    def rate_factors(self) -> set[float]:
        """The factors of the learning rate of all parameters."""
        return {self.rate}

    def __post_init__(self) -> None:
        if not self.word.strip():
            raise RequestError(
                "data.trigger", "is missing: name the word that prompts will say, such as --trigger zorb"
            )
        if found := [each for each in _SYNTAX if each in self.word]:
            word = printable(self.word, 40)
            raise RequestError(
                "data.trigger", f"is {word!r}; expected a word without {found[0]}, which is syntax of prompts"
            )
        if not 1 <= self.vectors <= MOST:
            raise RequestError(
                "embedding.vectors", f"is {self.vectors}; expected 1 to {MOST}, the tokens of a prompt's chunk"
            )


class EmbeddingVectors(nn.Module):
    """(vectors, width) parameters in float32 by text encoder, with the norms that they may have."""

    def __init__(self, vectors: Mapping[str, Tensor], norms: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.norms = dict(norms)
        for encoder, each in vectors.items():
            self.register_parameter(encoder, nn.Parameter(each))

    def vectors(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """{encoder: its vectors, those whose norm is out of range scaled to the nearest in it}.

        The range is that of the vocabulary: longer vectors outweigh all other words of a prompt. The gradient of a
        vector out of range has no part along it, so it turns but does not grow further. `weights` replace the
        parameters.
        """
        weights = dict(self.named_parameters()) if weights is None else weights
        return {encoder: _within(weights[encoder], *norms) for encoder, norms in self.norms.items()}


def _within(x: Tensor, least: Tensor, most: Tensor) -> Tensor:
    norms = x.norm(dim=1, keepdim=True)
    return x * (norms.clamp(least, most) / norms.clamp(min=1e-12))


class EmbeddingTarget:
    """The vectors of a new word of `model`, which keeps its weights; prompts know the word until `detach`.

    With `start`, the vectors of a file, these are trained further; of `options` then only the word and the rate apply.
    """

    keeps_weights = True

    def __init__(self, model: Model, options: EmbeddingOptions, *, start: Vectors | None = None) -> None:
        self.model, self.options = model, options
        encoders = model.text_encoders
        if start is None:
            start = {name: start_vectors(model, encoder, options) for name, encoder in encoders.items()}
        start = {name: each.to(model.device, torch.float32, copy=True) for name, each in start.items()}
        self.embedding = EmbeddingVectors(start, {name: norms_of(encoder) for name, encoder in encoders.items()})
        self.notes = [note] if (note := _note(model, options)) else []
        self._before = {name: each.clone() for name, each in start.items()}
        self._live = _Live(self.embedding)
        self._remove = model.embeddings.add(options.word, self._live)
        self._disable = [products.enable(network) for network in (model.unet, *encoders.values())]

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {NETWORK: self.embedding}

    @property
    def evaluated(self) -> Mapping[str, nn.Module]:
        return {"unet": self.model.unet, **self.model.text_encoders}

    @property
    def trains_text(self) -> bool:
        return True

    def groups(self) -> list[Group]:
        """A group per encoder. Decay would pull the vectors to zero, where no word is."""
        return [
            Group({f"{NETWORK}.{name}": parameter}, self.options.rate, decay=False)
            for name, parameter in self.embedding.named_parameters()
        ]

    def config(self) -> Mapping[str, Json]:
        count = next(len(each) for each in self.embedding.parameters())
        return {"target": "embedding", "word": self.options.word, "vectors": count}

    def begin_batch(self, number: int) -> None:
        """Nothing of an embedding is dropped."""

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The model with the vectors that training began with."""
        self._live.instead = self._before
        try:
            yield
        finally:
            self._live.instead = None

    def export(
        self,
        weights: Mapping[str, Tensor],
        path: Path,
        *,
        form: str = "adapter",
        names: str = "kohya",
        metadata: Mapping[str, str],
        averages: Averages | None = None,
        dtype: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the vectors as a .safetensors file, or as A1111's .pt; other programs know the word by the file's name.

        Raises RequestError for a form or naming that embeddings do not have.
        """
        if form != "adapter":
            raise RequestError("form", f"{printable(form, 40)!r} is for trained weights; this run trained an embedding")
        if names != "kohya":
            raise RequestError("names", f"{printable(names, 40)!r} is for LoRAs; all programs read the same embeddings")
        about = {**model_metadata(self.model, "textual-inversion", path.stem), **metadata}
        export_embedding(self.vectors(weights), path, self.options.word, about, overwrite=overwrite)

    @torch.no_grad()
    def vectors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{encoder: (vectors, width)} in float32 on the CPU, as they are exported of `weights`."""
        own = {name: weights.get(f"{NETWORK}.{name}", each) for name, each in self.embedding.named_parameters()}
        return {name: each.detach().float().cpu() for name, each in self.embedding.vectors(own).items()}

    def detach(self) -> None:
        """Prompts do not know the word any more."""
        for disable in self._disable:
            disable()
        self._remove()


class _Live(Mapping[str, Tensor]):
    """The present vectors by encoder, computed when a prompt is encoded, so that gradients reach the parameters."""

    def __init__(self, embedding: EmbeddingVectors) -> None:
        self._embedding = embedding
        self.instead: Mapping[str, Tensor] | None = None

    def __getitem__(self, encoder: str) -> Tensor:
        vectors = self._embedding.vectors() if self.instead is None else self.instead
        return vectors[encoder]

    def __iter__(self) -> Iterator[str]:
        return iter(self._embedding.norms)

    def __len__(self) -> int:
        return len(self._embedding.norms)


@torch.no_grad()
def start_vectors(model: Model, encoder: ClipText, options: EmbeddingOptions) -> Tensor:
    """(vectors, width) float32: those of the tokens of `start`, repeated if there are fewer, thinned out if more."""
    tokens = [token.id for part in chunk(options.start, model.tokenizer, plain=True) for token in part]
    if not tokens:
        raise RequestError("embedding.init_word", "has no tokens; name a word that describes the subject, such as dog")
    found = [tokens[number * len(tokens) // options.vectors] for number in range(options.vectors)]
    return encoder.embed(torch.tensor([found], device=model.device))[0].float().clone()


@torch.no_grad()
def norms_of(encoder: ClipText) -> tuple[Tensor, Tensor]:
    """The least and the largest norm of the vectors of a vocabulary; those of 0 are not counted."""
    norms = encoder.text_model.embeddings.token_embedding.weight.float().norm(dim=1)
    return torch.where(norms > 0, norms, torch.inf).min(), norms.max()


def _note(model: Model, options: EmbeddingOptions) -> str:
    word = options.word
    tokens = [token.id for part in chunk(word, model.tokenizer, plain=True) for token in part]
    if len(tokens) == 1:
        return (
            f"{printable(word, 40)!r} is a word that the model knows; prompts with it mean the embedding while its "
            "file is used"
        )
    return ""

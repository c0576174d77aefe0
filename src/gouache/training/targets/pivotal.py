"""Pivotal tuning as the target of a run: an adapter and the vectors of a new word, trained together, in one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from gouache.errors import RequestError, printable
from gouache.layouts.adapters import BUNDLE_PREFIX
from gouache.training.objective import Group, Json
from gouache.training.targets.adapter import AdapterTarget
from gouache.training.targets.embedding import EmbeddingOptions, EmbeddingTarget
from gouache.training.targets.export import Averages
from gouache.training.targets.export_embedding import tensors_of
from gouache.training.targets.options import AdapterOptions


@dataclass(frozen=True)
class PivotalOptions:
    """The options of both; their rates are factors of the same learning rate."""

    adapter: AdapterOptions
    embedding: EmbeddingOptions

    @property
    def rate_factors(self) -> set[float]:
        return self.adapter.rate_factors | self.embedding.rate_factors


class PivotalTarget:
    """`adapter` and `embedding` on the same model; prompts know the word while the adapter is attached."""

    keeps_weights = True

    def __init__(self, adapter: AdapterTarget, embedding: EmbeddingTarget) -> None:
        self.model, self.adapter, self.embedding = adapter.model, adapter, embedding
        self.notes = [*adapter.notes, *embedding.notes]

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {**self.adapter.networks, **self.embedding.networks}

    @property
    def evaluated(self) -> Mapping[str, nn.Module]:
        return {**self.adapter.evaluated, **self.embedding.evaluated}

    @property
    def trains_text(self) -> bool:
        return True

    def groups(self) -> list[Group]:
        return [*self.adapter.groups(), *self.embedding.groups()]

    def config(self) -> Mapping[str, Json]:
        return {**self.adapter.config(), "embedding": dict(self.embedding.config())}

    def begin_batch(self, number: int) -> None:
        self.adapter.begin_batch(number)
        self.embedding.begin_batch(number)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        with ExitStack() as both:
            both.enter_context(self.adapter.frozen())
            both.enter_context(self.embedding.frozen())
            yield

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
        """Write the adapter with the vectors in it as `bundle_emb.WORD.*`, which web UIs and Gouache read.

        Raises RequestError for forms and namings that have no vectors.
        """
        if form != "adapter":
            raise RequestError("form", f"{printable(form, 40)!r} is for weights; a model's file has no embeddings")
        if names != "kohya":
            raise RequestError("names", f"{printable(names, 40)!r} has no embeddings; use kohya, which bundles them")
        prefix = f"{BUNDLE_PREFIX}{self.embedding.options.word}."
        vectors = tensors_of(self.embedding.vectors(weights))
        more = {prefix + name: each for name, each in vectors.items()}
        self.adapter.export(weights, path, names=names, metadata=metadata, dtype=dtype, overwrite=overwrite, more=more)

    def detach(self) -> None:
        self.embedding.detach()
        self.adapter.detach()

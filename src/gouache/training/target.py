"""The interface between a run and what it trains: an adapter, the weights of networks, the vectors of an embedding."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from gouache.model.model import Model
from gouache.training.objective import Group, Json
from gouache.training.targets.export import Averages


class Target(Protocol):
    """What is trained, and how it becomes a file.

    `networks` have the trained weights; their names precede the names of weights in checkpoints. `trains_text` is
    whether a text encoder or the vectors of a word are trained, so that captions must be encoded at every step.
    `keeps_weights`: the model's networks keep the weights of their file, which can be freed and read again. `notes`
    are lines for the user.
    """

    @property
    def model(self) -> Model: ...

    @property
    def notes(self) -> list[str]: ...

    @property
    def keeps_weights(self) -> bool: ...

    @property
    def networks(self) -> Mapping[str, nn.Module]: ...

    @property
    def evaluated(self) -> Mapping[str, nn.Module]:
        """The networks of the model that compute the losses: those that are trained, or carry an adapter that is."""
        ...

    @property
    def trains_text(self) -> bool: ...

    def groups(self) -> list[Group]:
        """The trained parameters with the factors of their learning rates."""
        ...

    def config(self) -> Mapping[str, Json]:
        """What identifies the target in a checkpoint: form, ranks, trained parts; nothing that may change on resume."""
        ...

    def begin_batch(self, number: int) -> None:
        """Draw the dropouts of batch `number` from (seed, number); called before its losses are computed."""
        ...

    def frozen(self) -> AbstractContextManager[None]:
        """Within the block the networks compute what they did before training: for the prior of the frozen model."""
        ...

    def export(
        self,
        weights: Mapping[str, Tensor],
        path: Path,
        *,
        form: str,
        names: str,
        metadata: Mapping[str, str],
        averages: Averages | None = None,
        dtype: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write `weights` (named as in checkpoints; those that are missing are the present ones) as a file that other
        tools read.

        `form`: adapter (for embeddings and hypernetworks too), full, pruned or pruned-emaonly; `names`: kohya, peft or
        diffusers, for adapters; `averages` are those that a model's file holds beside the weights; `dtype` is that of
        weights in the file, where its format leaves a choice. With a form of models the model may have the trained
        weights afterwards. Raises RequestError for a form that this target does not have.
        """
        ...

    def detach(self) -> None:
        """Leave the model as it was before, if it `keeps_weights`."""
        ...

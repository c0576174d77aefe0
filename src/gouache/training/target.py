"""The interface between a run and what it trains: an adapter, the weights of networks, the vectors of an embedding."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from gouache.training.objective import Group, Json


class Target(Protocol):
    """What is trained, and how it becomes a file.

    `networks` have the trained weights; their names precede the names of weights in checkpoints. `trains_text` is
    whether a text encoder is trained, so that captions must be encoded at every step.
    """

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
        self, weights: Mapping[str, Tensor], path: Path, *, form: str, names: str, metadata: Mapping[str, str]
    ) -> None:
        """Write `weights` (named as in checkpoints) as a file that other tools read.

        `form`: adapter, full, pruned or pruned-emaonly; `names`: kohya, peft or diffusers, for adapters. Raises
        RequestError for a form that this target does not have.
        """
        ...

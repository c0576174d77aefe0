"""Measuring the weights during a run: averaged and last ones, without dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from gouache.training.snapshot import Run, averaged

Validate = Callable[[], Mapping[str, float]]
"""Returns named numbers of the weights that the networks have when it is called; "loss" is to be low."""


def measure(run: Run, validate: Validate) -> dict[str, float]:
    """What `validate` returns for the averaged weights, and as "raw NAME" for the last weights if they are others.

    All processes measure, and have the results of the main one, so that they decide the same.
    """
    with evaluating(run.objective.networks):
        with averaged(run) as are_others:
            scores = dict(validate())
        if are_others:
            scores.update({f"raw {name}": value for name, value in validate().items()})
    return run.world.of_main(scores)


@contextmanager
def evaluating(networks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the block all modules are in evaluation mode: without dropout, as when images are generated."""
    modules = [module for network in networks.values() for module in network.modules()]
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes):
            module.training = mode

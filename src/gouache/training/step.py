"""One optimizer step: gradients of its batches, their norm, and the update of weights and averages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gouache.errors import TrainingError, is_out_of_memory, printable
from gouache.training import sharding
from gouache.training.snapshot import Run

Batches = Callable[[int], Any]
"""Returns the batch of a number, counted from 0. It depends on the number alone, so that a run can resume anywhere."""


def accumulate_gradients(run: Run, batches: Batches, first: int) -> dict[str, Tensor]:
    """Add the mean gradient of the `accumulate` batches from number `first` on; returns the mean of each loss.

    A loss that some of the batches do not have is averaged over the others. With several processes, gradients and
    losses are the means over all of them.
    """
    parts: dict[str, list[Tensor]] = {}
    count = run.settings.accumulate
    for number in range(first, first + count):
        losses = run.objective.losses(batches(number), number)
        if losses["loss"].requires_grad:  # not with an embedding whose word is in no caption of the batch
            (losses["loss"] / count).backward()
        sharding.collect(run.sharded, run.parameters)
        run.masters.collect()
        for name, value in losses.items():
            parts.setdefault(name, []).append(value.detach())
    run.world.average_gradients(each for name, each in run.masters.tensors.items() if name not in run.sharded)
    return run.world.mean({name: torch.stack(values).mean() for name, values in parts.items()})


def clip_gradients(run: Run) -> Tensor:
    """Scale all gradients so that their common norm is at most `clip_norm`; returns the norm before.

    If it is not finite the gradients are left as they are, so that one can see which of them are not.
    """
    trained = list(run.masters.tensors.values())
    norm = _norm(run.masters.tensors[name] for name in run.masters.tensors if name not in run.sharded)
    if run.sharded:
        parts = _norm(run.masters.tensors[name] for name in run.sharded)
        norm = (norm.to(parts).square() + run.world.sum(parts.square())).sqrt()
    if run.settings.clip_norm and torch.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(trained, run.settings.clip_norm, norm)
    return norm


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm([each.grad for each in tensors if each.grad is not None])


def update(run: Run, step: int) -> None:
    """The optimizer's step number `step` (counted from 0) at the rate of that step, and the averages of the result.

    Raises TrainingError if the optimizer fails.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = run.settings.rate(step) * group["rate"]
    try:
        run.optimizer.step()
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        problem = printable(" ".join(str(error).split()), 300)
        raise TrainingError(f"the optimizer {run.settings.optimizer} failed at step {step + 1}: {problem}") from None
    clear_gradients(run)
    run.masters.store(run.settings.seed, step)
    if run.ema is not None:
        run.ema.update(run.masters.exact)


def clear_gradients(run: Run) -> None:
    run.optimizer.zero_grad(set_to_none=True)

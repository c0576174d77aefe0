"""What to do when a loss or a gradient is not finite: find where it began, then stop or go on without that step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gouache.errors import TrainingError, printable
from gouache.training import state as checkpoint
from gouache.training.position import Position
from gouache.training.snapshot import Run, fault, is_finite, reader, restore
from gouache.training.step import Batches, clear_gradients

MOST_SKIPPED = 10
"""After as many skipped steps one after the other, the run stops: no single batch is the cause."""


@runtime_checkable
class Describes(Protocol):
    """An objective that can name the pictures of a batch and their timesteps."""

    def describe(self, batch: Any, number: int, /) -> str: ...


def step_is_finite(losses: Mapping[str, Tensor], norm: Tensor) -> bool:
    """Whether the update that a step would make is finite."""
    return bool(torch.isfinite(norm + losses["loss"]))


def skip(run: Run, position: Position, folder: Path, saved: int, batches: Batches, losses: Mapping[str, Tensor]) -> str:
    """Give up a step whose loss, gradient or weights are not finite; returns a line that says which and why.

    Normally the weights are those of the last good step, since nothing was updated: this step will be skipped. If the
    weights themselves are not finite, the last update broke them: the run returns to its newest checkpoint, and will
    skip that step. Either way `position.skipped` has the step, and what follows does not depend on when checkpoints
    were saved; the last one is of step `saved`. Raises TrainingError if the settings say so, if too many steps were
    skipped, or if there is no checkpoint to return to.
    """
    broken = not is_finite(run)
    # The batch of another process may be the cause.
    found = run.world.all_of(_diagnosis(run, position, batches, losses, broken))
    reason = next((text for is_here, text in found if is_here), found[0][1])
    clear_gradients(run)
    if run.settings.not_finite == "stop":
        kept = f"the checkpoint of step {saved} is good" if saved else "no checkpoint was saved yet"
        raise TrainingError(f'{reason}; {kept}; {_ADVICE}, or with not_finite = "skip"')
    culprit = position.step
    if broken:  # the last step that was not skipped
        culprit = max((step for step in range(position.step) if step not in position.skipped), default=0)
    skipped = sorted({*position.skipped, culprit})
    if set(range(culprit - MOST_SKIPPED, culprit + 1)) <= set(skipped):
        raise TrainingError(f"{reason}; {MOST_SKIPPED} steps before it were skipped too; {_ADVICE}")
    if broken:
        state = checkpoint.newest(folder, fault=fault, read=reader(run))
        if state is None:
            raise TrainingError(f"{reason}; there is no checkpoint to return to; {_ADVICE}")
        changes = list(run.changes)
        returned = restore(run, state, folder)
        run.changes[:] = changes
        vars(position).update(vars(returned))
    position.skipped = skipped
    return f"{reason}; " + (
        f"the run returns to step {position.step} and skips step {culprit + 1}" if broken else "the step is skipped"
    )


_ADVICE = "start the run again with a lower learning_rate"


def _diagnosis(
    run: Run, position: Position, batches: Batches, losses: Mapping[str, Tensor], broken: bool
) -> tuple[bool, str]:
    """(whether a batch of this process is the cause, what was found)."""
    if broken:
        return False, f"step {position.step}: its update made weights that are not finite"
    values = ", ".join(f"{name} {float(value):g}" for name, value in losses.items())
    found = f"step {position.step + 1}: a loss or gradient is not finite ({values})"
    begins = _first_gradient(run)
    all_pictures, guilty = [], []
    for number in range(position.number, position.number + run.settings.accumulate):
        batch = batches(number)
        pictures = run.objective.describe(batch, number) if isinstance(run.objective, Describes) else ""
        all_pictures.append(pictures)
        if module := _first_module(run, batch, number):
            begins = module
            guilty.append(pictures)
    named = "; ".join(each for each in guilty or all_pictures if each)
    text = "; ".join(filter(None, [found + (f", first in {begins}" if begins else ""), printable(named, 600)]))
    return bool(guilty), text


def _first_module(run: Run, batch: Any, number: int) -> str:
    """The first module whose output is not finite when the losses of the batch are computed again; "" if none is."""
    found: list[str] = []
    objective = run.objective
    networks = getattr(objective, "evaluated", objective.networks)  # the trained part may be an adapter of others
    with _watched(networks, found):  # with gradients, because the same dropouts and kernels act only then
        loss = objective.losses(batch, number)["loss"].detach()
    if found:
        return found[0]
    return "" if torch.isfinite(loss) else "the loss itself"


@contextmanager
def _watched(networks: Mapping[str, nn.Module], found: list[str]) -> Iterator[None]:
    """Within the block, the names of modules whose output is not finite are appended to `found`, in order."""

    def watch(name: str, module: nn.Module) -> Any:
        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not all(_all_finite(each) for each in _tensors(output)):
                found.append(f"{name} ({type(module).__name__})")

        return module.register_forward_hook(after)

    hooks = [
        watch(f"{network}.{name}" if name else network, module)
        for network, root in networks.items()
        for name, module in root.named_modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _first_gradient(run: Run) -> str:
    """The last of the parameters, in the order of the network, whose gradient is not finite: backward begins there."""
    bad = [name for name, each in run.masters.tensors.items() if each.grad is not None and not _all_finite(each.grad)]
    return f"the gradient of {bad[-1]}" if bad else ""


def _tensors(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    elif hasattr(output, "__dict__"):
        output = list(vars(output).values())
    return [each for part in output for each in _tensors(part)] if isinstance(output, list | tuple) else []


def _all_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())

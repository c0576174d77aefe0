"""A run that goes on with a training checkpoint of another trainer: it becomes the run's first checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from gouache.errors import RequestError, TrainingError, printable
from gouache.training import lightning, optimizers, state
from gouache.training.denoising import Denoising
from gouache.training.optimizers import OptimizerState
from gouache.training.position import Position
from gouache.training.run_settings import RunSettings
from gouache.training.snapshot import begin, capture
from gouache.wording import plural

_OPTIMIZERS = ("adamw", "adam")  # that have the moments of such checkpoints


def check(settings: RunSettings) -> None:
    """Raises RequestError if a run with these settings cannot go on with another trainer's checkpoint."""
    if settings.adapter.form != "none":
        raise RequestError("model.continued", "needs a run that trains the weights themselves (finetune)")
    if settings.train.optimizer not in _OPTIMIZERS:
        raise RequestError(
            "model.continued", f"needs the optimizer {' or '.join(_OPTIMIZERS)}, whose moments the file has"
        )


def write(
    settings: RunSettings, objective: Denoising, file: Path, folder: Path, on_note: Callable[[str], None]
) -> None:
    """Save the weights, moments, averages and step of `file`, from which the model was loaded, as a checkpoint.

    Raises ModelError if it has none, RequestError if its step is not before the last one of the run.
    """
    found = lightning.read(file)
    if found.step >= settings.train.steps:
        raise RequestError(
            "train.steps",
            f"is {settings.train.steps}, and {printable(file.name)} is at step {found.step}; set more than that",
        )
    run = begin(objective, settings.train)
    names = run.masters.tensors
    moments = {path: tensor for path, tensor in found.optimizer.tensors.items() if path.rpartition(".")[0] in names}
    without = len(names) - len({path.rpartition(".")[0] for path in moments})
    if without == len(names):
        raise TrainingError(f"{printable(file.name)} has no moments of what is trained; start from its weights instead")
    optimizers.restore(run.optimizer, names, OptimizerState(moments))
    if run.ema is not None and found.averages:
        run.ema.start(_completed(found.averages, run.masters.exact))
        run.ema.updates = found.updates
    for note in found.notes:
        on_note(note)
    if without:
        on_note(f"{plural(without, 'trained weight')} without moments in it")
    position = Position(step=found.step, number=found.step * settings.train.accumulate)
    state.save(folder, capture(run, position), settings.train.keep)


def _completed(averages: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The averages of all trained weights; those of text encoders, which have none there, begin with the weights."""
    return {name: averages.get(name, tensor) for name, tensor in weights.items()}

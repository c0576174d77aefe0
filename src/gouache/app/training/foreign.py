"""A run that goes on with a training checkpoint of PyTorch Lightning: its moments, averages and step.

They become the run's first checkpoint, in its folder, from which the loop resumes as from any other.
"""

from __future__ import annotations

from gouache.app.training.folder import RunFolder
from gouache.app.training.prepare import OnNote, Prepared
from gouache.errors import RequestError, printable
from gouache.training import lightning, optimizers, snapshot, state
from gouache.training.optimizers import OptimizerState
from gouache.training.position import Position
from gouache.training.targets.weights import WeightsTarget
from gouache.wording import plural


def begin(ready: Prepared, run: RunFolder, on_note: OnNote) -> None:
    """Save the state in the model's file as the first checkpoint of `run`, unless the run has one.

    The moments of weights that are not trained are left out. Raises RequestError if they are those of another
    optimizer, or no step is left to train; ModelError if the file has no training state.
    """
    if run.steps():
        return
    settings = ready.settings.train
    if not isinstance(ready.target, WeightsTarget):
        raise RequestError("model.resume", "goes on with the weights of a model; set adapter.form to none")
    if settings.optimizer not in ("adam", "adamw"):
        raise RequestError("model.resume", f"takes over moments of Adam, not for {printable(settings.optimizer)}")
    found = lightning.read(ready.model.file.path)
    if found.step >= settings.steps:
        raise RequestError(
            "train.steps", f"is {settings.steps}, but the checkpoint is that of step {found.step}; set more steps"
        )
    begun = snapshot.begin(ready.objective, settings)
    trained = begun.masters.tensors
    kept = {name: value for name, value in found.optimizer.tensors.items() if name.rpartition(".")[0] in trained}
    optimizers.restore(begun.optimizer, trained, OptimizerState(kept))
    if begun.ema is not None and set(begun.ema.weights) <= set(found.averages):
        begun.ema.start(found.averages)
        begun.ema.updates = found.updates
    for note in found.notes:
        on_note(note)
    if left := len(found.optimizer.tensors) - len(kept):
        on_note(f"{plural(left, 'moment')} of weights that this run does not train left out")
    position = Position(step=found.step, number=found.step * settings.accumulate)
    state.save(run.path, snapshot.capture(begun, position), settings.keep)

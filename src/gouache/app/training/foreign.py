"""A run that goes on with a training checkpoint of PyTorch Lightning: its moments, averages and step.

They become the run's first checkpoint, in its folder, from which the loop resumes as from any other.
"""

from __future__ import annotations

from gouache.app.training.folder import RunFolder
from gouache.app.training.prepare import OnNote, Prepared
from gouache.errors import ModelError, RequestError, printable
from gouache.files.record import ModelFile
from gouache.training import lightning, optimizers, snapshot, state
from gouache.training.optimizers import OptimizerState
from gouache.training.position import Position
from gouache.training.run_settings import RunSettings
from gouache.wording import plural


def check(settings: RunSettings, file: ModelFile) -> None:
    """Raises RequestError or ModelError, before any weight is read, if the run cannot go on with `file`."""
    train = settings.train
    if settings.result != "model":
        raise RequestError("model.resume", "goes on with the weights of a model; set adapter.form to none")
    if train.optimizer not in ("adam", "adamw"):
        raise RequestError("model.resume", f"takes over moments of Adam, not for {printable(train.optimizer)}")
    if (step := lightning.step_of(file)) >= train.steps:
        raise RequestError(
            "train.steps", f"is {train.steps}, but the checkpoint is that of step {step}; set more steps"
        )


def hint(settings: RunSettings, file: ModelFile) -> str:
    """One line for a file that could be gone on with, and is only started from; else ""."""
    if settings.model.resume or settings.result != "model" or "optimizer_states" not in file.extra:
        return ""
    step = file.extra.get("global_step")
    return (
        f"{printable(file.path.name)} is a training checkpoint of step {step}; to go on from there: --set resume=true"
    )


def begin(ready: Prepared, run: RunFolder, on_note: OnNote) -> None:
    """Save the state in the model's file as the first checkpoint of `run`, unless the run has one.

    The moments of weights that are not trained are left out. Raises ModelError if the file's moments do not fit.
    """
    if run.steps():
        return
    settings = ready.settings.train
    found = lightning.read(ready.model.file.path)
    begun = snapshot.begin(ready.objective, settings)
    trained = begun.masters.tensors
    kept = {name: value for name, value in found.optimizer.tensors.items() if name.rpartition(".")[0] in trained}
    if not kept:
        name = printable(ready.model.file.path.name)
        raise ModelError(f"{name} has no moments of what is trained; start from its weights instead")
    optimizers.restore(begun.optimizer, trained, OptimizerState(kept))
    if begun.ema is not None and found.averages:  # those of text encoders are not in such files
        begun.ema.start({name: found.averages.get(name, tensor) for name, tensor in begun.masters.exact.items()})
        begun.ema.updates = found.updates
    for note in found.notes:
        on_note(note)
    if without := len(trained) - len({name.rpartition(".")[0] for name in kept}):
        on_note(f"{plural(without, 'trained weight')} begin without moments")
    if left := len(found.optimizer.tensors) - len(kept):
        on_note(f"{plural(left, 'moment')} of weights that this run does not train left out")
    position = Position(step=found.step, number=found.step * settings.accumulate)
    state.save(run.path, snapshot.capture(begun, position), settings.keep)

"""From settings to what the loop needs: model, target, data, objective. Everything that can be wrong is found here.

settings -> header of the model -> pictures and captions -> model -> target -> caches and batches -> objective
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from gouache.app import hashes, loading, machine, names
from gouache.app.model import Model
from gouache.app.settings import Settings
from gouache.app.training import class_pictures, pretraining, sliders
from gouache.app.training.batches import make_batches, make_validation, validation_batches
from gouache.app.training.defaults import trainable
from gouache.app.training.folder import RunFolder
from gouache.app.training.objective import (
    make_concept_objective,
    make_concept_validation,
    make_objective,
    timesteps_of,
)
from gouache.app.training.parts import check_start, make_target, options_of
from gouache.app.training.pictures import (
    OnNote,
    Pictures,
    class_folder,
    mask_note,
    paints_class,
    read_pictures,
    sides,
)  # fmt: skip
from gouache.app.training.pretraining import PictureValidation, Reconstructions
from gouache.app.training.sliders import ConceptBatches
from gouache.data.shard_records import ShardRecords
from gouache.errors import RequestError, TrainingError, printable
from gouache.families.family import NoiseLevels
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.generate.request import Request
from gouache.model import residency
from gouache.model.inpainting import CHANNELS as INPAINTING_CHANNELS
from gouache.training import checkpointing, memory, optimizers, sharding
from gouache.training.batches import Batches
from gouache.training.distributed import ALONE, World
from gouache.training.evaluation import Validate
from gouache.training.objective import Group, Objective
from gouache.training.pretraining.target import AutoencoderTarget
from gouache.training.run_settings import RunSettings
from gouache.training.target import Target

OnWork = Callable[[str, int, int], None]


class SizedBatches(Protocol):
    """Batches by number, with the sizes of their pictures in pixels."""

    def __call__(self, number: int, /) -> Any: ...

    def __len__(self) -> int:
        """The number of batches per epoch."""
        ...

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """(width, height) of each picture."""
        ...

    @property
    def resolution(self) -> tuple[int, int]:
        """(width, height) of the largest pictures."""
        ...


class SampleSource(Protocol):
    """What shows a run's state at some of its steps, see `samples.Samples`."""

    def paint(self, step: int, ending: str = "", world: World = ALONE) -> object: ...

    def forget(self, after: int) -> None: ...


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to begin. `samples` are painted while it trains, None: those of the settings."""

    settings: RunSettings
    model: Model
    target: Target
    objective: Objective
    pictures: Pictures
    batches: SizedBatches
    validation: Validate
    samples: SampleSource | None = None

    @property
    def resolution(self) -> tuple[int, int]:
        """(width, height) of the largest pictures; of a text encoder's pretraining, that of the model."""
        if pretraining.side_of_pictures(self.settings, self.model):
            return self.model.size
        return self.batches.resolution


class Preparation(Protocol):
    """What `prepared` is: makes a run from its settings. A recipe may have one of its own, see `runs.run`."""

    def __call__(
        self,
        settings: RunSettings,
        folder: RunFolder,
        user: Settings,
        *,
        on_note: OnNote,
        on_work: OnWork,
        world: World,
    ) -> AbstractContextManager[Prepared]: ...


def check_model(settings: RunSettings, user: Settings) -> tuple[Path, Found]:
    """The file of the model and what its header says. Raises GouacheError if it cannot be trained with `settings`."""
    path = names.resolve(settings.model.name, user)
    found = identify(
        open_model(path), prediction=settings.model.prediction or None, family=settings.model.family or None
    )
    spec = trainable(found)
    if settings.model.inpainting and settings.result != "model" and spec.in_channels != INPAINTING_CHANNELS:
        raise RequestError(
            "model.inpainting",
            f"{printable(settings.model.name)} has {spec.in_channels} input channels; train its weights "
            "(adapter.form = none), or a LoRA of an inpainting model",
        )
    if settings.mode == "slider":
        sliders.check_model(settings, spec)
    options = options_of(settings, sorted(name for name in found.components if name.startswith("text_encoder")))
    if settings.memory.dtype == "fp16":
        raise RequestError("memory.dtype", "fp16 needs scaled losses, which are not available; use bf16 or fp32")
    if settings.model.zero_terminal_snr and found.prediction is not None and found.prediction.value == "eps":
        raise RequestError(
            "model.zero_terminal_snr",
            f"needs a model that predicts v: {printable(settings.model.name)} predicts the noise, which says "
            "nothing of the picture at a level without signal; leave it out, or train towards model.prediction = v",
        )
    check_start(settings, user)
    timesteps_of(settings, (found.levels.value if found.levels is not None else NoiseLevels()).steps)
    settings.train.rate(0)
    optimizers.build(
        settings.train, [Group({"a": nn.Parameter(torch.zeros(2, 2))}, factor) for factor in options.rate_factors]
    )
    return path, found


@contextmanager
def prepared(
    settings: RunSettings,
    folder: RunFolder,
    user: Settings,
    *,
    on_note: OnNote,
    on_work: OnWork,
    fill_caches: bool = True,
    pictures: Pictures | None = None,
    world: World = ALONE,
) -> Iterator[Prepared]:
    """A context manager of the run; afterwards the model is free of the target and the threads have ended.

    `fill_caches`: paint missing class pictures, and encode all pictures and captions that can be known now. `pictures`
    are those that were read before. Several processes of a `world` fill the caches together. Raises GouacheError.
    """
    check_model(settings, user)
    if world.size > 1 and (settings.mode == "slider" or pretraining.trains_on_pictures(settings)):
        what = "slider" if settings.mode == "slider" else f"pretrain (part {settings.pretrain.part})"
        raise RequestError("mode", f"{what} trains in one process; start it without torchrun")
    if settings.memory.shard:
        _check_shard(settings)
    settings = _equal_dtype(settings, user, world)
    with ExitStack() as leaving:
        leaving.callback(memory.limit_heap, 12)
        memory.limit_heap(1)
        pictures = read_pictures(settings, folder, on_note, user) if pictures is None else pictures
        model = load_model(settings, user, on_note)
        if fill_caches and world.of_main(_paint_class(settings, user, model, on_work) if world.is_main else 0):
            pictures = read_pictures(settings, folder, lambda line: None, user)
        if settings.model.zero_terminal_snr:  # only now: the class is painted as the model is
            model.core.schedule = model.schedule.zero_terminal_snr()
        target = make_target(settings, model, user)
        if settings.memory.shard and world.size > 1:
            sharding.shard(target.networks.values(), world)
        leaving.callback(target.detach)
        for note in target.notes:
            on_note(note)
        if settings.mode == "slider":
            yield _without_pictures(settings, model, target, pictures, user)
            return
        batches = leaving.enter_context(
            make_batches(settings, folder, model, target, pictures.training, on_note=on_note, world=world)
        )
        if pretraining.trains_on_pictures(settings):
            yield _on_pictures(settings, folder, model, target, pictures, batches, user)
            return
        known = () if isinstance(pictures.training, ShardRecords) else batches.rows  # of others masks are not decoded
        masked = {row.record.path: row.content.counted for row in known if row.content.counted is not None}
        if masked:
            on_note(mask_note(list(masked.values()), len({row.record.path for row in batches.rows})))
        for network in (model.unet, *model.text_encoders.values()) if settings.memory.checkpointing else ():
            checkpointing.enable(network)
        objective = make_objective(settings, model, target, batches, user, pictures.caption_dropout)
        objective = replace(objective, autocast=world.of_main(objective.autocast))  # it is measured too
        filled = fill_caches and settings.data.cache
        if filled and target.keeps_weights:
            model.unload("U-Net")  # the largest part, which the caches do not need
        if filled:  # first, so that the validation finds the captions that it shares with training
            _fill(settings, batches, on_work)
        validation = make_validation(settings, folder, model, target, pictures, objective, on_note)
        objective = replace(objective, validation=validation.identity)
        if filled:
            free_encoders(settings, model, target)
        model.reload("U-Net")
        memory.limit_heap(12)
        yield Prepared(settings, model, target, objective, pictures, batches, validation)


def _without_pictures(
    settings: RunSettings, model: Model, target: Target, pictures: Pictures, user: Settings
) -> Prepared:
    concepts = sliders.concepts_of(settings)
    if settings.memory.checkpointing:
        checkpointing.enable(model.unet)
    objective = make_concept_objective(settings, model, target, concepts, user)
    validation = make_concept_validation(settings, objective)
    objective = replace(objective, validation=validation.identity)
    validation = replace(validation, objective=objective)
    free_encoders(settings, model, target)
    memory.limit_heap(12)
    batches = ConceptBatches(concepts, sliders.size_of(concepts, model.size))
    return Prepared(settings, model, target, objective, pictures, batches, validation)


def _check_shard(settings: RunSettings) -> None:
    """Raises RequestError for what sharded weights do not do."""
    if settings.result != "model":
        raise RequestError("memory.shard", "is for trained weights (mode finetune); others are small, leave it out")
    if settings.loss.prior == "model":
        raise RequestError("memory.shard", "does not keep the weights before training, which loss.prior = model needs")
    sharding.check(settings.train.optimizer, settings.train.rounding)


def _equal_dtype(settings: RunSettings, user: Settings, world: World) -> RunSettings:
    """The settings with the dtype that the main process chooses: it is measured, and each could choose another."""
    if world.size == 1 or settings.memory.dtype or settings.result == "model":
        return settings
    device = residency.device(settings.device or user.device)
    dtype = world.of_main(_automatic_dtype(settings, device, user))
    return settings.model_copy(update={"memory": settings.memory.model_copy(update={"dtype": dtype})})


def _on_pictures(
    settings: RunSettings,
    folder: RunFolder,
    model: Model,
    target: Target,
    pictures: Pictures,
    batches: Batches,
    user: Settings,
) -> Prepared:
    """That of an autoencoder or a text encoder, whose batches have pictures."""
    for network in target.networks.values() if settings.memory.checkpointing else ():
        checkpointing.enable(network)
    if isinstance(target, AutoencoderTarget):
        target.pictures = lambda: pretraining.measured(batches)
    objective = pretraining.make_objective(settings, model, batches, user)
    held_out, probe, name = validation_batches(settings, folder, model, target, pictures, None)
    objective = replace(objective, validation=name)
    memory.limit_heap(12)
    validation = PictureValidation(objective, held_out, probe, name)
    samples = Reconstructions(objective, [*held_out, *probe], folder.samples)
    return Prepared(settings, model, target, objective, pictures, batches, validation, samples)


def load_model(settings: RunSettings, user: Settings, on_note: OnNote, device: torch.device | None = None) -> Model:
    """The model in the dtype for training, with its own schedule; on `device`, by default that of the settings.

    Raises GouacheError, also if its file is not that of the settings.
    """
    chosen = settings.model
    dtype = settings.memory.dtype or None
    if dtype is None and settings.result == "model":
        dtype = "fp32"
    device = device or residency.device(settings.device or user.device)
    model = loading.load(
        chosen.name,
        device=device,
        dtype=dtype or _automatic_dtype(settings, device, user),
        prediction=chosen.prediction or None,
        family=chosen.family or None,
        vae=None if chosen.vae == "automatic" else chosen.vae,
        settings=user,
        on_note=on_note,
    )
    if chosen.sha256 and hashes.sha256(model.file, user) != chosen.sha256:
        raise TrainingError(
            f"{printable(str(model.file.path))} is not the model that the run began with: its SHA-256 is another; name "
            "that file in model.name, or start a new run"
        )
    for network in (model.unet, model.vae, *model.text_encoders.values()):
        network.requires_grad_(False)
    return model


def _automatic_dtype(settings: RunSettings, device: torch.device, user: Settings) -> str:
    """The user's dtype, or the fastest; not fp16, in which gradients overflow and vanish without scaled losses."""
    dtype = residency.dtype(user.dtype) if user.dtype else None
    if dtype is None:
        found = identify(open_model(names.resolve(settings.model.name, user)), family=settings.model.family or None)
        dtype = machine.best_dtype(device, trainable(found).channels, user)
    if dtype != torch.float16:
        return residency.dtype_name(dtype)
    return "bf16" if "bf16" in residency.native_dtypes(device) else "fp32"


def _paint_class(settings: RunSettings, user: Settings, model: Model, on_work: OnWork) -> int:
    """Paint the missing pictures of the class; returns how many there were."""
    data, where = settings.data, class_folder(settings, user)
    if where is None or not paints_class(settings):
        return 0
    size, clip_skip = sides(data.resolution, model.size)[-1], settings.model.clip_skip or None
    request = Request(prompt=data.class_word, size=size, clip_skip=clip_skip)
    return class_pictures.paint_missing(
        model, request, data.class_pictures, where,
        lambda done, total: on_work("painting class pictures", done, total),
    )  # fmt: skip


def free_encoders(settings: RunSettings, model: Model, target: Target) -> None:
    """Free the weights of what only fills the caches; it is read again when something is painted or not cached yet."""
    if not settings.data.cache:
        return
    model.unload("VAE")
    if not target.trains_text:
        model.unload("text encoder")
    memory.trim()


def _fill(settings: RunSettings, batches: Batches, on_work: OnWork) -> None:
    """Encode what the first epochs need, and all pictures of the class, so that encoders are hardly needed later."""
    epochs = max(8, batches.plan.cycle)
    count = min(settings.train.steps * settings.train.accumulate, batches.plan.total(epochs))
    batches.prepare(range(count), lambda done, total: on_work("encoding pictures and captions", done, total))

"""Pretraining from settings: models of random weights, and what is trained of an autoencoder or a text encoder.

The U-Net is trained as in any other run; the two other parts have objectives and batches of their own.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gouache.app.model import Model
from gouache.app.settings import Settings
from gouache.app.training.objective import autocast_of, base_of
from gouache.app.training.samples import forget
from gouache.data.record import Record
from gouache.errors import RequestError
from gouache.files.record import ModelFile
from gouache.files.write import describe, write_atomic
from gouache.nn.clip_vision import ClipVision
from gouache.nn.spec import VisionSpec
from gouache.training.autoencoder import Reconstruction
from gouache.training.batch import Batch
from gouache.training.batches import Batches
from gouache.training.contrastive import Temperature
from gouache.training.distributed import ALONE, World
from gouache.training.evaluation import evaluating
from gouache.training.pretraining import initial
from gouache.training.pretraining.adversary import Adversary, Discriminator
from gouache.training.pretraining.features import RandomFeatures
from gouache.training.pretraining.objectives import AutoencoderObjective, TextObjective
from gouache.training.pretraining.presets import Preset, preset, presets
from gouache.training.run_settings import RunSettings
from gouache.workshop import save

PARTS: Mapping[str, str] = {"vae": "vae", "text": "text_encoder", "unet": "unet"}
"""Values of pretrain.part and the components of a model that they mean."""
_MEASURED = 64  # pictures whose latents are measured
_TOKENS = 77
Objective = AutoencoderObjective | TextObjective


def trains_on_pictures(settings: RunSettings) -> bool:
    """Whether a part is trained whose batches have pictures instead of latents."""
    return settings.mode == "pretrain" and settings.pretrain.part != "unet"


def with_initial_model(settings: RunSettings, user: Settings) -> RunSettings:
    """The settings with the file of random weights as their model, if they ask for it; written unless it is there.

    It depends on size and seed alone, and is kept with the user's data. Raises GouacheError.
    """
    if settings.mode != "pretrain":
        return settings
    if trains_on_pictures(settings):  # nothing is encoded
        if settings.data.cache and "cache" in settings.data.model_fields_set:
            raise RequestError("data.cache", f"has no effect on the part {settings.pretrain.part}; leave it out")
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"cache": False})})
    if not settings.pretrain.initial_size:
        return settings
    path = initial_model(settings.pretrain.initial_size, settings.train.seed, user)
    return settings.model_copy(update={"model": settings.model.model_copy(update={"name": str(path)})})


def initial_model(size: str, seed: int, user: Settings) -> Path:
    """The file of a model with random weights."""
    chosen, path = preset(size), user.data / "initial models" / f"{size}-{seed}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save.write_file(_random_file(path, chosen, seed), path, "safetensors", overwrite=True)
    return path


def _random_file(path: Path, chosen: Preset, seed: int) -> ModelFile:
    shapes, positions = initial.file_shapes(chosen), torch.arange(_TOKENS)[None]
    infos = {name: describe(torch.empty(shape, device="meta")) for name, shape in shapes.items()}
    infos[initial.POSITIONS] = describe(positions)
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.title": f"random weights, {chosen.name}, seed {seed}",
        "modelspec.resolution": f"{chosen.resolution}x{chosen.resolution}",
    }

    def tensor(name: str) -> Tensor:
        return positions if name == initial.POSITIONS else initial.tensor_of_file(name, shapes, seed)

    return ModelFile(path, "safetensors", infos, tensor, metadata)


def side_of_pictures(settings: RunSettings, model: Model) -> int | None:
    """The side that all pictures are cut to, None if they have buckets: that of the text encoder's picture tower."""
    if settings.mode == "pretrain" and settings.pretrain.part == "text":
        return vision_spec(model).image_size
    return None


def vision_spec(model: Model) -> VisionSpec:
    """The picture tower for the model's text encoder: that of the preset of the same width, else one as wide.

    Raises RequestError for a model without a text encoder of Stable Diffusion 1.
    """
    if list(model.text_encoders) != ["text_encoder"] or model.family.name != "sd1":
        raise RequestError("pretrain.part", f"text is for Stable Diffusion 1; the model is {model.family.title}")
    text = model.text_encoders["text_encoder"].spec
    for each in presets().values():
        if each.text.width == text.width:
            return each.vision
    width = text.width
    heads = max(1, width // 64)
    return VisionSpec(
        width=width, layers=text.layers, heads=heads, mlp_width=4 * width, image_size=128, patch_size=16,
        projection=width,
    )  # fmt: skip


def check_pairs(settings: RunSettings, records: Iterable[Record]) -> None:
    """Raises RequestError if a text encoder has nothing to tell apart: its loss would be 0, whatever it says."""
    if settings.mode != "pretrain" or settings.pretrain.part != "text":
        return
    if settings.train.batch < 2:
        raise RequestError(
            "train.batch", "is 1: a text encoder learns which caption of a batch is that of a picture; use 2 or more"
        )
    captions = iter(each.captions for each in records)
    first = next(captions, ())
    if all(each == first for each in captions):
        raise RequestError(
            "data.folder",
            "has no pictures with different captions: a text encoder learns which caption is that of a picture; write "
            "a caption for each",
        )


def make_objective(settings: RunSettings, model: Model, batches: Batches, user: Settings) -> Objective:
    chosen, seed = settings.pretrain, settings.train.seed
    autocast, base = autocast_of(settings, model, user), base_of(model, user)
    if chosen.part == "vae":
        vae = model.vae
        adversary = None
        if chosen.adversarial:
            discriminator = Discriminator()
            initial.initialise(discriminator, "discriminator", seed)
            start = chosen.adversarial_start * settings.train.accumulate
            adversary = Adversary(discriminator.to(model.device), chosen.adversarial, start)
        return AutoencoderObjective(
            Reconstruction(vae, seed, chosen.kl, chosen.ssim, autocast),  # type: ignore[arg-type]
            RandomFeatures().to(model.device),
            chosen.perceptual,
            adversary,
            data=batches.identity,
            base=base,
        )
    vision = ClipVision(vision_spec(model))
    initial.initialise(vision, "vision", seed)

    def tokenize(captions: Sequence[str]) -> Tensor:
        return torch.stack([tokens_of(model, caption) for caption in captions])

    text = model.text_encoders["text_encoder"]
    return TextObjective(
        text, vision.to(model.device), Temperature().to(model.device), tokenize, autocast, batches.identity, base
    )


def tokens_of(model: Model, caption: str) -> Tensor:
    """(77,): the caption between its start and its ends, cut to fit."""
    vocabulary = model.text_encoders["text_encoder"].spec.vocabulary
    start, end = vocabulary - 2, vocabulary - 1
    tokens = [start, *model.tokenizer.encode(caption)[: _TOKENS - 2]]
    return torch.tensor([*tokens, *[end] * (_TOKENS - len(tokens))])


def measured(batches: Batches, count: int = _MEASURED) -> Iterator[Tensor]:
    """Pictures (B, 3, H, W) of the first batches, some `count` in all."""
    for number in range(-(-count // batches.options.batch)):
        yield batches(number % len(batches)).latents


@dataclass(frozen=True)
class PictureValidation:
    """The losses of pictures that are not trained on, and of a few that are, see `training.validation`."""

    objective: Objective
    held_out: Sequence[Batch]
    probe: Sequence[Batch]
    identity: str

    def __call__(self) -> dict[str, float]:
        with evaluating(self.objective.networks):
            if not self.held_out:
                return self.objective.evaluate(self.probe)
            losses = self.objective.evaluate(self.held_out)
            if self.probe:
                losses["training loss"] = self.objective.evaluate(self.probe)["loss"]
            return losses


class Reconstructions:
    """Samples of an autoencoder: some pictures above what it makes of them. Of a text encoder there are none."""

    def __init__(self, objective: Objective, batches: Sequence[Batch], folder: Path) -> None:
        self._objective, self._folder = objective, folder
        shown = list(islice((picture for batch in batches for picture in batch.latents), 6))
        size = shown[0].shape if shown else None
        self._pictures = [picture for picture in shown if picture.shape == size]

    @torch.no_grad()
    def paint(self, step: int, ending: str = "", world: World = ALONE) -> None:
        if not isinstance(self._objective, AutoencoderObjective) or not self._pictures:
            return
        vae = self._objective.reconstruction.vae
        decoded = [vae.decode(vae.encode(picture[None]).mean)[0] for picture in self._pictures]
        rows = [torch.cat(row, dim=2) for row in (self._pictures, decoded)]
        levels = ((torch.cat(rows, dim=1).float().clamp(-1, 1) + 1) * 127.5).round().byte()
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(levels.permute(1, 2, 0).cpu())).save(buffer, "PNG")
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._folder / f"step-{step:08d}-00{ending}.png", buffer.getvalue())

    def forget(self, after: int) -> None:
        forget(self._folder, after)

"""The three stages of the embedded model's training: first weights, data and objectives of runs of Gouache.

Each is a context manager that prepares a run, as `gouache.app.training.prepare.prepared` does for a folder of pictures.
The weights that a training from nothing begins with are chosen, not random: `init_vae`, `init_text`, `init_unet_*`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gouache.app.settings import Settings
from gouache.app.training import prepare
from gouache.app.training.folder import RunFolder
from gouache.app.training.pictures import Pictures as TrainingPictures
from gouache.app.training.prepare import OnNote, OnWork, Preparation, Prepared
from gouache.data.dataset import DataSet
from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.denoiser import Denoiser
from gouache.diffusion.schedule import Schedule
from gouache.errors import RequestError
from gouache.nn.clip_text import ClipText
from gouache.nn.clip_vision import ClipVision
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec, VisionSpec
from gouache.nn.unet import UNet
from gouache.training import state
from gouache.training.autoencoder import Pictures, Reconstruction, psnr
from gouache.training.batch import Batch
from gouache.training.contrastive import Contrast
from gouache.training.denoising import Denoising
from gouache.training.distributed import ALONE, World
from gouache.training.objective import step_generator
from gouache.training.pretraining.presets import Preset
from gouache.training.pretraining.target import PartTarget
from gouache.training.run_settings import RunSettings
from gouache.training.targets.weights import WeightsOptions, WeightsTarget
from recipes.mini import init_text, init_unet_layout, init_unet_positions, init_unet_whitening, init_vae
from recipes.mini.batches import NEUTRAL, SIZE, SceneData
from recipes.mini.dataset import TRAINING_SEED, VALIDATION_SEED, sample
from recipes.mini.latent_cache import LatentCache
from recipes.mini.layout_tokens import END, CaptionedLatents, LayoutHead, LayoutObjective
from recipes.mini.scenes import TRAINING, UNIFORM, Distribution, without_jitter

VAE = VaeSpec(channels=64, channel_mult=(1, 1, 1, 1))
TEXT = TextSpec(width=128, layers=6, heads=2, mlp_width=768)
VISION = VisionSpec(width=128, layers=4, heads=2, mlp_width=512, image_size=64, patch_size=8, projection=128)
# The norms have 32 groups. With 32 channels each channel would be a group of its own, and the norm would remove its
# mean, by which prompts and timesteps act on a whole map. With 64, differences within a group remain.
UNET = UNetSpec(channels=64, channel_mult=(1, 1, 1, 2), context_dim=128)
SIZES = Preset("mini", SIZE, UNET, VAE, TEXT, VISION)
CROP = 64
LATENT_NOISE = 0.08  # the maximum noise that the decoder is trained with, as a fraction of the latents' deviation
CAPTION_LENGTH = 40  # tokens of the longest caption, begin and end included
CAPTION_DROPOUT = 0.03  # the share of captions that are empty when the text encoder is trained
_NO_PICTURES = TrainingPictures(DataSet(()), (), ())


@dataclass(frozen=True)
class Batches:
    """`make` gives the batch of a number; scenes never repeat, so an epoch is a number of batches like any other."""

    make: Callable[[int], Any]
    side: int = SIZE

    def __call__(self, number: int) -> Any:
        return self.make(number)

    def __len__(self) -> int:
        return 1000

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [self.resolution]

    @property
    def resolution(self) -> tuple[int, int]:
        return self.side, self.side


class NoSamples:
    """Of parts that do not paint."""

    def paint(self, step: int, ending: str = "", world: World = ALONE) -> None: ...

    def forget(self, after: int) -> None: ...


def preparations(data: SceneData, layout: Mapping[str, Tensor] | None) -> dict[str, Preparation]:
    """Those of all stages. `layout` are the weights of the layout head that belongs to the model they start from; None:
    training begins with nothing, and each stage sets its first weights.
    """
    return {
        "vae": partial(_vae, data, layout is None),
        "text": partial(_text, data, layout),
        "unet": partial(_unet, data, layout is None),
    }


@contextmanager
def _vae(
    data: SceneData,
    is_new: bool,
    settings: RunSettings,
    folder: RunFolder,
    user: Settings,
    *,
    on_note: OnNote,
    on_work: OnWork,
    world: World,
) -> Iterator[Prepared]:
    model, colours, train = prepare.load_model(settings, user, on_note), data.colour_statistics(), settings.train
    vae = model.vae
    if is_new:
        init_vae.initialise(vae, colours)
    target = PartTarget(model, WeightsOptions(("vae",)))
    objective = Reconstruction(vae, train.seed, autocast=True, groups=tuple(init_vae.groups(vae, encoder=False)))

    def batch(number: int) -> Pictures:
        whole, _ = data.batch(TRAINING_SEED, number * train.batch, train.batch)
        generator = step_generator(train.seed, number)
        corners = torch.randint(0, (SIZE - CROP) // 8 + 1, (len(whole), 2), generator=generator) * 8
        images = torch.stack([image[:, y : y + CROP, x : x + CROP] for image, (y, x) in zip(whole, corners.tolist())])
        latents = init_vae.latents(images, colours)
        # A U-Net's latents never equal the encoder's exactly: the decoder is trained with noise on them.
        generator = step_generator(train.seed, -1 - number)
        amount = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, generator=generator) / init_vae.LATENT_SCALE
        return Pictures(images, latents + amount * torch.randn(latents.shape, generator=generator))

    unseen, _ = data.batch(VALIDATION_SEED, 0, 32)

    @torch.no_grad()
    def validate() -> Mapping[str, float]:
        decoded = vae.decode(init_vae.latents(unseen, colours))
        return {"loss": -float(psnr(decoded, unseen).mean())}

    yield Prepared(settings, model, target, objective, _NO_PICTURES, Batches(batch), validate, NoSamples())


@torch.no_grad()
def initialise_text(text: ClipText, layout: LayoutHead, data: SceneData) -> None:
    """A text encoder that starts with its nouns; the vectors of tokens that no caption can contain are zero."""
    tokenize = data.tokenizer.encode
    captions = (sample(TRAINING_SEED, index, data.things).caption for index in range(100_000))
    used = data.tokens(captions, CAPTION_LENGTH).unique().tolist()
    names = {word: number for number, thing in enumerate(data.things) for word in thing.words}
    # Tokens of captions that do not depend on the thing: all but the nouns.
    few = data.things[:3]
    common = {token for index in range(4000) for token in tokenize(sample(TRAINING_SEED, index, few).caption)}
    common -= {token for thing in few for word in thing.words for token in tokenize(word)}
    colours = data.colour_statistics()
    table = init_text.measure_appearance(
        data.things, data.glyphs, lambda images: init_vae.latents(images, colours) * init_vae.LATENT_SCALE
    )
    init_text.initialise(text, layout, table, names, tokenize, common, used)


@contextmanager
def _text(
    data: SceneData,
    head: Mapping[str, Tensor] | None,
    settings: RunSettings,
    folder: RunFolder,
    user: Settings,
    *,
    on_note: OnNote,
    on_work: OnWork,
    world: World,
) -> Iterator[Prepared]:
    model, layout, train = prepare.load_model(settings, user, on_note), LayoutHead(TEXT.width), settings.train
    target = PartTarget(model, WeightsOptions(("text_encoder",)))
    text = model.text_encoders["text_encoder"]
    torch.manual_seed(2)
    vision = ClipVision(VISION)
    with torch.no_grad():
        vision.vision_model.embeddings.position_embedding.weight.mul_(0.1)
    if head is not None:
        layout.load_state_dict(dict(head))
    elif not folder.steps():  # otherwise the checkpoint has all of it
        initialise_text(text, layout, data)
    text.text_model.embeddings.token_embedding.weight.register_hook(_keep_neutral)
    init_text.freeze(text, layout)
    colours = data.colour_statistics()
    objective = LayoutObjective(Contrast(text, vision), layout, init_vae.channel_weights(colours), autocast=True)

    def batch(seed: int, number: int) -> CaptionedLatents:
        generator = step_generator(seed, number)
        contrastive = number % 4 == 1
        if contrastive:
            samples = data.contrastive_samples(seed, number, train.batch)
        else:
            samples = data.samples(seed, number * train.batch, train.batch, distribution_for(seed))
        # Trained on what captions do not determine, the layout would be the mean of all possibilities: a blur.
        images, captions = data.render((replace(each, scene=without_jitter(each.scene)) for each in samples), SIZE)
        if not contrastive:
            captions = [
                "" if torch.rand((), generator=generator) < CAPTION_DROPOUT else caption for caption in captions
            ]
        # Tokens after the layout cannot change it, so only some batches include them, for their position loss.
        tokens = data.augment(data.tokens(captions, TEXT.positions if number % 4 == 0 else END), generator)
        small = F.interpolate(images, (VISION.image_size, VISION.image_size), mode="area") if contrastive else None
        return CaptionedLatents(tokens, init_vae.latents(images, colours) * init_vae.LATENT_SCALE, small)

    unseen = [batch(VALIDATION_SEED, number) for number in range(8)]

    @torch.no_grad()
    def validate() -> Mapping[str, float]:
        losses = [objective.losses(each, 0) for each in unseen]
        by_name = {name: [each[name] for each in losses if name in each] for name in ("layout", "position", "accuracy")}
        means = {name: float(torch.stack(values).mean()) for name, values in by_name.items()}
        return {"loss": means["layout"], **means}

    batches = Batches(lambda number: batch(TRAINING_SEED, number))
    yield Prepared(settings, model, target, objective, _NO_PICTURES, batches, validate, NoSamples())


def distribution_for(seed: int) -> Distribution:
    """Training samples common things more often; validation samples all things equally often."""
    return TRAINING if seed == TRAINING_SEED else UNIFORM


def _keep_neutral(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[NEUTRAL] = 0
    return gradient


def layout_head(folder: RunFolder) -> dict[str, Tensor]:
    """The weights of the layout head in the newest checkpoint of the text encoder's run. Raises RequestError."""
    found = state.newest(folder.path)
    if found is None:
        raise RequestError("stage", f"{folder.path} has no checkpoint; train that stage first")
    weights = {**found.tensors["weights"], **found.tensors.get("ema", {})}
    return {name.removeprefix("layout."): value for name, value in weights.items() if name.startswith("layout.")}


@torch.no_grad()
def initialise_unet(
    unet: UNet, layout: LayoutHead, captioned: Callable[[int], Batch], schedule: Schedule, seed: int
) -> None:
    """Set the U-Net's initial weights, with statistics of the batches `captioned(0)` to `captioned(63)`."""
    init_unet_whitening.initialise(unet, torch.cat([captioned(number).conditioning.context for number in range(8)]))
    init_unet_positions.initialise(unet)
    init_unet_layout.initialise(unet, layout)

    def noised(number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, generator = captioned(number), step_generator(seed, number)
        times = torch.randint(len(schedule.sigmas), (len(batch.latents),), generator=generator)
        inputs: list[Tensor] = []

        def record(x: Tensor, time: Tensor) -> Tensor:
            inputs.extend((x, time))
            return torch.zeros_like(x)

        noise = torch.randn(batch.latents.shape, generator=generator)
        _, target = Denoiser(record, schedule, "v").loss_terms(batch.latents, noise, schedule.sigma(times))
        return inputs[0], inputs[1], batch.conditioning.context, target

    init_unet_layout.fit_output_conv(unet, noised, 64)


@contextmanager
def _unet(
    data: SceneData,
    is_new: bool,
    settings: RunSettings,
    folder: RunFolder,
    user: Settings,
    *,
    on_note: OnNote,
    on_work: OnWork,
    world: World,
) -> Iterator[Prepared]:
    model, colours, train = prepare.load_model(settings, user, on_note), data.colour_statistics(), settings.train
    text, unet = model.text_encoders["text_encoder"], model.unet

    @torch.no_grad()
    def encode(tokens: Tensor) -> Conditioning:
        return Conditioning(text(tokens).last)

    def captioned(seed: int, first: int, count: int) -> Batch:
        images, captions = data.batch(seed, first, count, distribution=distribution_for(seed))
        tokens = data.augment(data.tokens(captions, TEXT.positions), step_generator(seed, first))
        return Batch(init_vae.latents(images, colours) * init_vae.LATENT_SCALE, encode(tokens))

    target = WeightsTarget(model, WeightsOptions(("unet",)))
    if is_new and not folder.steps():  # otherwise the checkpoint has its weights
        layout = LayoutHead(TEXT.width)
        layout.load_state_dict(layout_head(RunFolder(folder.path.parent / "text")))
        seed = train.seed
        initialise_unet(unet, layout, lambda number: captioned(TRAINING_SEED, 64 * number, 64), model.schedule, seed)
    init_unet_layout.disable_self_attention(unet)
    objective = Denoising(
        model.denoiser,
        {"unet": unet},
        encode(data.tokens([""], TEXT.positions)),
        train.seed,
        weighting="velocity",
        channel_weights=init_vae.channel_weights(colours),
        autocast=True,
    )

    # Unseen scenes, eight fixed timesteps in turn, fixed noise.
    unseen = captioned(VALIDATION_SEED, 0, 256)
    noise = torch.randn(unseen.latents.shape, generator=step_generator(train.seed, -1))
    times = (torch.arange(8) * 125 + 62).repeat(32)
    drop = torch.zeros(len(times), dtype=torch.bool)

    @torch.no_grad()
    def validate() -> Mapping[str, float]:
        return {"loss": float(objective.loss(unseen, times, noise, drop).mean())}

    cache = LatentCache(lambda first, count: captioned(TRAINING_SEED, first, count), train.batch, train.seed)
    yield Prepared(settings, model, target, objective, _NO_PICTURES, Batches(cache), validate)

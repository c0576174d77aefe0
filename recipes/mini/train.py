"""Train the embedded model: python -m recipes.mini.train all|vae|text|unet [--folder runs/mini] [--seconds N]

The stages, in order, are vae, text and unet. Each can be interrupted at any moment, by Ctrl-C or a kill, and resumes
from its newest checkpoint; `recipes.mini.bundle` writes a model file of the current state. With `--start FILE`, stages
begin from the weights in a bundled file, and unet uses that file's text encoder where the folder has none. So training
can continue where only its product was kept, for the embedded model by `--start src/gouache/embedded/mini.safetensors`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.denoiser import Denoiser
from gouache.diffusion.schedule import Schedule
from gouache.errors import RequestError
from gouache.files.open import open_model
from gouache.nn.clip_text import ClipText
from gouache.nn.clip_vision import ClipVision
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec, VisionSpec
from gouache.nn.unet import UNet
from gouache.nn.vae import Autoencoder
from gouache.training import state
from gouache.training.autoencoder import Pictures, Reconstruction, psnr
from gouache.training.batch import Batch
from gouache.training.contrastive import Contrast
from gouache.training.denoising import Denoising
from gouache.training.loop import Progress, Result, train
from gouache.training.objective import step_generator
from gouache.training.settings import Settings, read
from recipes.mini import init_text, init_unet_layout, init_unet_positions, init_unet_whitening, init_vae
from recipes.mini.batches import NEUTRAL, SIZE, SceneData
from recipes.mini.command import run_command
from recipes.mini.dataset import TRAINING_SEED, VALIDATION_SEED, sample
from recipes.mini.latent_cache import LatentCache
from recipes.mini.layout_tokens import END, CaptionedLatents, LayoutHead, LayoutObjective
from recipes.mini.rendering import Glyphs
from recipes.mini.scenes import TRAINING, UNIFORM, Distribution, without_jitter
from recipes.mini.weights import network_weights, newest_weights

VAE = VaeSpec(channels=64, channel_mult=(1, 1, 1, 1))
TEXT = TextSpec(width=128, layers=6, heads=2, mlp_width=768, projection=128)
VISION = VisionSpec(width=128, layers=4, heads=2, mlp_width=512, image_size=64, patch_size=8, projection=128)
# The norms have 32 groups. With 32 channels each channel would be a group of its own, and the norm would remove its
# mean, by which prompts and timesteps act on a whole map. With 64, differences within a group remain.
UNET = UNetSpec(channels=64, channel_mult=(1, 1, 1, 2), context_dim=128)
PREDICTION = "v"
CROP = 64
LATENT_NOISE = 0.08  # the maximum noise that the decoder is trained with, as a fraction of the latents' deviation
CAPTION_LENGTH = 40  # tokens of the longest caption, begin and end included
LAYOUT = Path(__file__).with_name("layout_head.safetensors")  # the layout head of the embedded model's text encoder
CAPTION_DROPOUT = 0.03  # the share of captions that are empty when the text encoder is trained
TEXT_PROJECTION = "text_projection."  # not in bundled files

StartWeights = Callable[[str], dict[str, Tensor]]  # a network's name to the weights that its training begins from


def new_vae(colours: init_vae.ColourStatistics) -> Autoencoder:
    torch.manual_seed(1)
    vae = Autoencoder(VAE)
    init_vae.initialise(vae, colours)
    return vae


def train_vae(data: SceneData, settings: Settings, folder: Path, seconds: float, start: StartWeights | None) -> Result:
    colours = data.colour_statistics()
    vae = new_vae(colours)
    if start is not None:
        load_weights(vae, start("vae"), may_lack=("encoder.", "quant_conv."))
    objective = Reconstruction(vae, settings.seed, autocast=True, groups=tuple(init_vae.groups(vae, encoder=False)))

    def batches(number: int) -> Pictures:
        whole, _ = data.batch(TRAINING_SEED, number * settings.batch, settings.batch)
        corners = (
            torch.randint(0, (SIZE - CROP) // 8 + 1, (len(whole), 2), generator=step_generator(settings.seed, number))
            * 8
        )
        images = torch.stack([image[:, y : y + CROP, x : x + CROP] for image, (y, x) in zip(whole, corners.tolist())])
        latents = init_vae.latents(images, colours)
        # A U-Net's latents never equal the encoder's exactly: the decoder is trained with noise on them.
        generator = step_generator(settings.seed, -1 - number)
        amount = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, generator=generator) / init_vae.LATENT_SCALE
        return Pictures(images, latents + amount * torch.randn(latents.shape, generator=generator))

    unseen, _ = data.batch(VALIDATION_SEED, 0, 32)

    @torch.no_grad()
    def validate() -> Mapping[str, float]:
        decoded = vae.decode(init_vae.latents(unseen, colours))
        return {"loss": -float(psnr(decoded, unseen).mean())}

    return train(objective, batches, settings, folder, on_log=_print_progress, validate=validate, seconds=seconds)


def new_text(data: SceneData, layout: LayoutHead) -> ClipText:
    """A text encoder that starts with its nouns; the vectors of tokens that no caption can contain are zero."""
    torch.manual_seed(2)
    text = ClipText(TEXT)
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
    return text


def train_text(data: SceneData, settings: Settings, folder: Path, seconds: float, start: StartWeights | None) -> Result:
    layout = LayoutHead(TEXT.width)
    if start is not None:  # before the initial weights are computed, which takes a minute
        with torch.device("meta"):
            check_weights(ClipText(TEXT), start("text"), may_lack=(TEXT_PROJECTION,))
        check_weights(layout, start("layout"))
    text = new_text(data, layout)
    if start is not None:
        load_weights(layout, start("layout"))
        load_weights(text, start("text"), may_lack=(TEXT_PROJECTION,))
    vision = ClipVision(VISION)
    with torch.no_grad():
        vision.vision_model.embeddings.position_embedding.weight.mul_(0.1)
    text.text_model.embeddings.token_embedding.weight.register_hook(_keep_neutral)
    init_text.freeze(text, layout)
    colours = data.colour_statistics()
    objective = LayoutObjective(Contrast(text, vision), layout, init_vae.channel_weights(colours), autocast=True)

    def batch(seed: int, number: int) -> CaptionedLatents:
        generator = step_generator(seed, number)
        contrastive = number % 4 == 1
        if contrastive:
            samples = data.contrastive_samples(seed, number, settings.batch)
        else:
            samples = data.samples(seed, number * settings.batch, settings.batch, distribution_for(seed))
        # Trained on what captions do not determine, the layout would predict the mean of all possibilities: a blur.
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

    batches = lambda number: batch(TRAINING_SEED, number)  # noqa: E731
    return train(objective, batches, settings, folder, on_log=_print_progress, validate=validate, seconds=seconds)


def distribution_for(seed: int) -> Distribution:
    """Training samples common things more often; validation samples all things equally often."""
    return TRAINING if seed == TRAINING_SEED else UNIFORM


def _keep_neutral(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[NEUTRAL] = 0
    return gradient


def trained_text(folder: Path, start: StartWeights | None) -> ClipText:
    """The text encoder of a stage's newest checkpoint, or else of the start weights; frozen."""
    text = ClipText(replace(TEXT, projection=None))
    weights = newest_weights(folder, "text")
    if weights is None and start is not None:
        weights = start("text")
    weights = weights or trained_weights(folder, "text")
    load_weights(text, {name: value for name, value in weights.items() if not name.startswith(TEXT_PROJECTION)})
    return text.requires_grad_(False).eval()


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
        _, target = Denoiser(record, schedule, PREDICTION).loss_terms(batch.latents, noise, schedule.sigma(times))
        return inputs[0], inputs[1], batch.conditioning.context, target

    init_unet_layout.fit_output_conv(unet, noised, 64)


def train_unet(data: SceneData, settings: Settings, folder: Path, seconds: float, start: StartWeights | None) -> Result:
    text = trained_text(folder.parent / "text", start)
    colours = data.colour_statistics()

    @torch.no_grad()
    def encode(tokens: Tensor) -> Conditioning:
        return Conditioning(text(tokens).last)

    def captioned(seed: int, first: int, count: int) -> Batch:
        images, captions = data.batch(seed, first, count, distribution=distribution_for(seed))
        tokens = data.augment(data.tokens(captions, TEXT.positions), step_generator(seed, first))
        return Batch(init_vae.latents(images, colours) * init_vae.LATENT_SCALE, encode(tokens))

    torch.manual_seed(3)
    unet = UNet(UNET)
    schedule = Schedule.scaled_linear()
    cache = LatentCache(lambda first, count: captioned(TRAINING_SEED, first, count), settings.batch, settings.seed)
    if start is not None:
        load_weights(unet, start("unet"))
    elif state.newest(folder) is None:  # otherwise the checkpoint has its weights
        layout = LayoutHead(TEXT.width)
        load_weights(layout, trained_weights(folder.parent / "text", "layout"))
        initialise_unet(unet, layout, lambda number: captioned(TRAINING_SEED, 64 * number, 64), schedule, settings.seed)
    init_unet_layout.disable_self_attention(unet)

    def denoiser(conditioning: Conditioning) -> Denoiser:
        def network(x: Tensor, time: Tensor) -> Tensor:
            return unet(x, time, conditioning.context).to(x.dtype)

        return Denoiser(network, schedule, PREDICTION)

    objective = Denoising(
        denoiser,
        {"unet": unet},
        encode(data.tokens([""], TEXT.positions)),
        settings.seed,
        weighting="velocity",
        channel_weights=init_vae.channel_weights(colours),
        autocast=True,
    )

    # Unseen scenes, eight fixed timesteps in turn, fixed noise.
    unseen = captioned(VALIDATION_SEED, 0, 256)
    noise = torch.randn(unseen.latents.shape, generator=step_generator(settings.seed, -1))
    times = (torch.arange(8) * 125 + 62).repeat(32)
    drop = torch.zeros(len(times), dtype=torch.bool)

    @torch.no_grad()
    def validate() -> Mapping[str, float]:
        loss = objective.loss(unseen, times, noise, drop)
        return {"loss": float(loss.mean())}

    return train(objective, cache, settings, folder, on_log=_print_progress, validate=validate, seconds=seconds)


def start_weights(model: Path, layout: Path) -> StartWeights:
    """The weights in a bundled file, and in the file of its text encoder's layout head."""
    file, head = open_model(model), open_model(layout)
    return lambda network: network_weights(head if network == "layout" else file, network)


def trained_weights(folder: Path, network: str) -> dict[str, Tensor]:
    """The weights of `network` in the newest checkpoint of a stage, averaged ones where available."""
    weights = newest_weights(folder, network)
    if weights is None:
        raise RequestError("stage", f"{folder} has no checkpoint; train that stage first")
    return weights


def check_weights(network: nn.Module, weights: Mapping[str, Tensor], may_lack: tuple[str, ...] = ()) -> None:
    """RequestError unless names and shapes fit; weights whose names start with one of `may_lack` may be missing."""
    expected = network.state_dict()
    for name in [*weights, *expected]:
        found, wanted = (tuple(tensors[name].shape) if name in tensors else None for tensors in (weights, expected))
        if found != wanted and not (found is None and name.startswith(may_lack)):
            raise RequestError(
                "start",
                f"the file does not fit this recipe: {name} is {found or 'missing'} there, {wanted or 'unknown'} here;"
                " use a file that this version of the recipe wrote",
            )


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], may_lack: tuple[str, ...] = ()) -> None:
    """Load weights after `check_weights`; the missing ones keep their values."""
    check_weights(network, weights, may_lack)
    network.load_state_dict(weights, strict=False)


def _print_progress(progress: Progress) -> None:
    losses = "  ".join(f"{name} {value:.4f}" for name, value in progress.losses.items())
    left = progress.left / 60
    print(f"step {progress.step}/{progress.steps}  {losses}  {progress.seconds:.0f} s, {left:.0f} min left", flush=True)


STAGES = {"vae": train_vae, "text": train_text, "unet": train_unet}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["all", *STAGES])
    parser.add_argument("--folder", type=Path, default=Path("runs/mini"))
    parser.add_argument("--seconds", type=float, default=math.inf, help="save and stop after this time")
    parser.add_argument("--start", type=Path, help="a bundled file to begin from")
    parser.add_argument("--layout", type=Path, default=LAYOUT, help="the layout head of its text encoder")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, if it is not in a usual font folder")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)

    def run() -> None:
        start = None if options.start is None else start_weights(options.start, options.layout)
        data = SceneData(glyphs=Glyphs(options.font))
        for stage in STAGES if options.stage == "all" else [options.stage]:
            settings = read(Path(__file__).with_name("recipe.toml"), stage)
            result = STAGES[stage](data, settings, options.folder / stage, options.seconds, start)
            print(f"{stage}: step {result.step}, {'finished' if result.finished else 'stopped; run again to continue'}")
            if not result.finished:
                break

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())

"""Train the embedded model: python -m recipes.mini.train all|vae|text|unet [--folder runs/mini] [--seconds N]

The stages, in order, are vae, text and unet. Each can be stopped by Ctrl-C or a kill at
any moment and goes on where its newest checkpoint stands; `recipes.mini.bundle` makes a model file of what there is.
With `--start FILE`, stages begin from the weights in a bundled file instead of from nothing, and unet reads prompts
with that file's text tower where none was trained in the folder: a run can be taken up where only its product was kept,
as that of the embedded model by `--start src/gouache/embedded/mini.safetensors`.
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
from gouache.training.contrastive import Contrast
from gouache.training.denoising import Captioned, Denoising
from gouache.training.loop import Progress, Result, train
from gouache.training.objective import chance
from gouache.training.settings import Settings, read
from recipes.mini import canvas_start, listening, start, text_start, whereabouts
from recipes.mini.batches import NEUTRAL, SIZE, Scenes
from recipes.mini.canvas import END, Canvas, Laid, Telling
from recipes.mini.command import ended
from recipes.mini.dataset import TRAINING_SEED, VALIDATION_SEED, sample
from recipes.mini.parts import averaged, part_of
from recipes.mini.pool import Pool
from recipes.mini.scenes import FIRST_STAGE, TAUGHT, Distribution, settled

VAE = VaeSpec(channels=64, channel_mult=(1, 1, 1, 1))
TEXT = TextSpec(width=128, layers=6, heads=2, mlp_width=768, projection=128)
VISION = VisionSpec(width=128, layers=4, heads=2, mlp_width=512, image_size=64, patch_size=8, projection=128)
# The norms have 32 groups: with 32 channels, each channel is a group of its own, and its mean, which is where a prompt
# or a time says anything to a whole map, is taken away. From 64 on, differences within a group survive.
UNET = UNetSpec(channels=64, channel_mult=(1, 1, 1, 2), context_dim=128)
PREDICTION = "v"
CROP = 64
HAZE = 0.08  # the most noise that a decoder learns to see through, as a share of the latents' spread
SHORT = 40  # tokens of the longest caption, its ends included: what follows is the end, again and again
CANVAS = Path(__file__).with_name("canvas.safetensors")  # what reads the canvas of the embedded model's text tower
UNSAID = 0.03  # the share of pictures of which the text tower is told nothing

Begin = Callable[[str], dict[str, Tensor]]  # a network's name to the weights that it begins from


def new_vae(colours: start.Colours) -> Autoencoder:
    torch.manual_seed(1)
    vae = Autoencoder(VAE)
    start.prepare(vae, colours)
    return vae


def train_vae(scenes: Scenes, settings: Settings, folder: Path, seconds: float, begin: Begin | None) -> Result:
    colours = scenes.colours()
    vae = new_vae(colours)
    if begin is not None:
        put(vae, begin("vae"), may_lack=("encoder.", "quant_conv."))
    objective = Reconstruction(vae, settings.seed, autocast=True, own_groups=tuple(start.groups(vae, encoder=False)))

    def batches(number: int) -> Pictures:
        whole, _ = scenes.batch(TRAINING_SEED, number * settings.batch, settings.batch)
        corners = torch.randint(0, (SIZE - CROP) // 8 + 1, (len(whole), 2), generator=chance(settings.seed, number)) * 8
        images = torch.stack([image[:, y : y + CROP, x : x + CROP] for image, (y, x) in zip(whole, corners.tolist())])
        latents = start.latents(images, colours)
        # What a U-Net draws is never quite what an encoder says.
        chances = chance(settings.seed, -1 - number)
        haze = HAZE * torch.rand(len(latents), 1, 1, 1, generator=chances) / start.LATENT_SCALE
        return Pictures(images, latents + haze * torch.randn(latents.shape, generator=chances))

    unseen, _ = scenes.batch(VALIDATION_SEED, 0, 32)

    @torch.no_grad()
    def validate() -> Mapping[str, float]:
        back = vae.decode(start.latents(unseen, colours))
        return {"loss": -float(psnr(back, unseen).mean())}

    return train(objective, batches, settings, folder, on_log=_tell, validate=validate, seconds=seconds)


def new_text(scenes: Scenes, canvas: Canvas) -> ClipText:
    """A text tower that starts with its nouns; its tokens are neutral (zero) where no caption can hold them."""
    torch.manual_seed(2)
    text = ClipText(TEXT)
    split = scenes.tokenizer.encode
    captions = (sample(TRAINING_SEED, index, scenes.things).caption for index in range(100_000))
    met = scenes.tokens(captions, SHORT).unique().tolist()
    words = {word: number for number, thing in enumerate(scenes.things) for word in thing.words}
    # What captions of whatever thing hold: all words but the nouns.
    few = scenes.things[:3]
    common = {token for index in range(4000) for token in split(sample(TRAINING_SEED, index, few).caption)}
    common -= {token for thing in few for word in thing.words for token in split(word)}
    colours = scenes.colours()
    table = text_start.look(
        scenes.things, scenes.glyphs, lambda images: start.latents(images, colours) * start.LATENT_SCALE
    )
    text_start.prepare(text, canvas, table, words, split, common, met)
    return text


def train_text(scenes: Scenes, settings: Settings, folder: Path, seconds: float, begin: Begin | None) -> Result:
    canvas = Canvas(TEXT.width)
    text = new_text(scenes, canvas)
    if begin is not None:
        put(canvas, begin("canvas"))
        put(text, begin("text"), may_lack=("text_projection.",))
    vision = ClipVision(VISION)
    with torch.no_grad():
        vision.vision_model.embeddings.position_embedding.weight.mul_(0.1)
    text.text_model.embeddings.token_embedding.weight.register_hook(_keep_neutral)
    text_start.hold(text, canvas)
    colours = scenes.colours()
    objective = Telling(Contrast(text, vision), canvas, start.shown(colours), autocast=True)

    def laid(seed: int, number: int) -> Laid:
        chances = chance(seed, number)
        told_apart = number % 4 == 1
        if told_apart:
            samples = scenes.alike(seed, number, settings.batch)
        else:
            samples = scenes.samples(seed, number * settings.batch, settings.batch, drawn_for(seed))
        # Asked for what captions cannot know, a canvas would be the mean of all that may be: a blur.
        images, captions = scenes.drawn((replace(each, scene=settled(each.scene)) for each in samples), SIZE)
        if not told_apart:
            captions = ["" if torch.rand((), generator=chances) < UNSAID else caption for caption in captions]
        # What follows the canvas says nothing to it: only now and then must it learn to be still.
        tokens = scenes.strewn(scenes.tokens(captions, TEXT.positions if number % 4 == 0 else END), chances)
        small = F.interpolate(images, (VISION.image_size, VISION.image_size), mode="area") if told_apart else None
        return Laid(tokens, start.latents(images, colours) * start.LATENT_SCALE, small)

    unseen = [laid(VALIDATION_SEED, number) for number in range(8)]

    @torch.no_grad()
    def validate() -> Mapping[str, float]:
        losses = [objective.losses(batch, 0) for batch in unseen]
        told = {name: [each[name] for each in losses if name in each] for name in ("canvas", "place", "found")}
        means = {name: float(torch.stack(values).mean()) for name, values in told.items()}
        return {"loss": means["canvas"], **means}

    batches = lambda number: laid(TRAINING_SEED, number)  # noqa: E731
    return train(objective, batches, settings, folder, on_log=_tell, validate=validate, seconds=seconds)


def drawn_for(seed: int) -> Distribution:
    """Common things are taught oftener; how well a run goes is told by all things alike."""
    return TAUGHT if seed == TRAINING_SEED else FIRST_STAGE


def _keep_neutral(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[NEUTRAL] = 0
    return gradient


def trained_text(folder: Path, begin: Begin | None) -> ClipText:
    """The text tower of a stage that ran, or else of the file to begin from; frozen."""
    text = ClipText(replace(TEXT, projection=None))
    weights = averaged(folder, "text")
    if weights is None and begin is not None:
        weights = begin("text")
    weights = weights or trained(folder, "text")
    put(text, {name: value for name, value in weights.items() if name != "text_projection.weight"})
    return text.requires_grad_(False).eval()


@torch.no_grad()
def new_unet(unet: UNet, canvas: Canvas, captioned: Callable[[int], Captioned], schedule: Schedule, seed: int) -> None:
    """Set where the U-Net starts, from what the text tower says in some batches."""
    listening.prepare(unet, torch.cat([captioned(number).said.context for number in range(8)]))
    whereabouts.prepare(unet)
    canvas_start.prepare(unet, canvas)

    def noised(number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, chances = captioned(number), chance(seed, number)
        times = torch.randint(len(schedule.sigmas), (len(batch.latents),), generator=chances)
        asked: list[Tensor] = []

        def network(x: Tensor, time: Tensor) -> Tensor:
            asked.extend((x, time))
            return torch.zeros_like(x)

        noise = torch.randn(batch.latents.shape, generator=chances)
        _, wanted = Denoiser(network, schedule, PREDICTION).loss_terms(batch.latents, noise, schedule.sigma(times))
        return asked[0], asked[1], batch.said.context, wanted

    canvas_start.read_out(unet, noised, 64)


def train_unet(scenes: Scenes, settings: Settings, folder: Path, seconds: float, begin: Begin | None) -> Result:
    text = trained_text(folder.parent / "text", begin)
    colours = scenes.colours()

    @torch.no_grad()
    def said(tokens: Tensor) -> Conditioning:
        return Conditioning(text(tokens).last)

    def captioned(seed: int, first: int, count: int) -> Captioned:
        images, captions = scenes.batch(seed, first, count, distribution=drawn_for(seed))
        tokens = scenes.strewn(scenes.tokens(captions, TEXT.positions), chance(seed, first))
        return Captioned(start.latents(images, colours) * start.LATENT_SCALE, said(tokens))

    torch.manual_seed(3)
    unet = UNet(UNET)
    schedule = Schedule.scaled_linear()
    pool = Pool(lambda first, count: captioned(TRAINING_SEED, first, count), settings.batch, settings.seed)
    if begin is not None:
        put(unet, begin("unet"))
    elif state.newest(folder) is None:  # a run that goes on has its weights
        canvas = Canvas(TEXT.width)
        put(canvas, trained(folder.parent / "text", "canvas"))
        new_unet(unet, canvas, lambda number: captioned(TRAINING_SEED, 64 * number, 64), schedule, settings.seed)
    canvas_start.hush(unet)
    objective = Denoising(
        unet,
        schedule,
        PREDICTION,
        said(scenes.tokens([""], TEXT.positions)),
        settings.seed,
        weighting="velocity",
        counts=start.shown(colours),
        autocast=True,
    )

    # Unseen scenes, each at eight fixed times under fixed noise.
    unseen = captioned(VALIDATION_SEED, 0, 256)
    noise = torch.randn(unseen.latents.shape, generator=chance(settings.seed, -1))
    times = (torch.arange(8) * 125 + 62).repeat(32)
    loud = torch.zeros(len(times), dtype=torch.bool)

    @torch.no_grad()
    def validate() -> Mapping[str, float]:
        loss = objective.loss(unseen, times, noise, loud)
        return {"loss": float(loss.mean())}

    return train(objective, pool, settings, folder, on_log=_tell, validate=validate, seconds=seconds)


def begun(model: Path, canvas: Path) -> Begin:
    """The weights in a bundled file, and of what reads its text tower's canvas in another."""
    file, reader = open_model(model), open_model(canvas)
    return lambda network: part_of(reader if network == "canvas" else file, network)


def trained(folder: Path, network: str) -> dict[str, Tensor]:
    """The weights of `network` in the newest checkpoint of a stage, averages where they were trained."""
    weights = averaged(folder, network)
    if weights is None:
        raise RequestError("stage", f"{folder} holds no checkpoint yet; train that stage first")
    return weights


def put(network: nn.Module, weights: Mapping[str, Tensor], may_lack: tuple[str, ...] = ()) -> None:
    """Load weights; those whose names begin with what they `may_lack` can be missing, and stay."""
    known = network.state_dict()
    for name in [*weights, *known]:
        found, wanted = (tuple(place[name].shape) if name in place else None for place in (weights, known))
        if found != wanted and not (found is None and name.startswith(may_lack)):
            raise RequestError(
                "start",
                f"is a file of another recipe: {name} is {found or 'missing'} there, {wanted or 'unknown'} here",
            )
    network.load_state_dict(weights, strict=False)


def _tell(progress: Progress) -> None:
    losses = "  ".join(f"{name} {value:.4f}" for name, value in progress.losses.items())
    left = progress.left / 60
    print(f"step {progress.step}/{progress.steps}  {losses}  {progress.seconds:.0f} s, {left:.0f} min left", flush=True)


STAGES = {"vae": train_vae, "text": train_text, "unet": train_unet}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["all", *STAGES])
    parser.add_argument("--folder", type=Path, default=Path("runs/mini"))
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop and save after so long")
    parser.add_argument("--start", type=Path, help="a bundled file to begin from")
    parser.add_argument("--canvas", type=Path, default=CANVAS, help="what reads its text tower's canvas")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)

    def run() -> None:
        begin = None if options.start is None else begun(options.start, options.canvas)
        scenes = Scenes()
        for stage in STAGES if options.stage == "all" else [options.stage]:
            settings = read(Path(__file__).with_name("recipe.toml"), stage)
            result = STAGES[stage](scenes, settings, options.folder / stage, options.seconds, begin)
            print(f"{stage}: step {result.step}, {'finished' if result.finished else 'stopped; run again to go on'}")
            if not result.finished:
                break

    return ended(run)


if __name__ == "__main__":
    sys.exit(main())

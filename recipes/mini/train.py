"""Train the embedded model: python -m recipes.mini.train all|vae|text|layout|unet [--folder runs/mini] [--seconds N]

The stages, in order, are vae, text, layout (of the text tower too) and unet. Each can be stopped by Ctrl-C or a kill at
any moment and goes on where its newest checkpoint stands; `recipes.mini.bundle` makes a model file of what there is.
With `--start MODEL`, vae and unet begin from the weights of a bundled file instead of from nothing, and unet reads
prompts with that file's text tower: a run can be taken up where only its product was kept.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.denoiser import Denoiser
from gouache.diffusion.schedule import Schedule
from gouache.errors import GouacheError, RequestError
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.nn.clip_text import ClipText
from gouache.nn.clip_vision import ClipVision
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec, VisionSpec
from gouache.nn.unet import UNet
from gouache.nn.vae import Autoencoder
from gouache.prompts.tokenizer import Tokenizer
from gouache.training import state
from gouache.training.autoencoder import Pictures, Reconstruction, psnr
from gouache.training.contrastive import Contrast
from gouache.training.denoising import Captioned, Denoising
from gouache.training.loop import Progress, Result, train
from gouache.training.objective import chance
from gouache.training.settings import Settings, read
from recipes.mini import layout_start, listening, start, whereabouts
from recipes.mini.dataset import TRAINING_SEED, VALIDATION_SEED, Sample, sample
from recipes.mini.layout import Laid, Layout, Spelling, Telling
from recipes.mini.names import COLOURS, load_things
from recipes.mini.rendering import Glyphs, render
from recipes.mini.scenes import FIRST_STAGE, Distribution

VAE = VaeSpec(channels=64, channel_mult=(1, 1, 1, 1))
TEXT = TextSpec(width=128, layers=6, heads=2, mlp_width=512, projection=128)
VISION = VisionSpec(width=128, layers=4, heads=2, mlp_width=512, image_size=64, patch_size=8, projection=128)
# The norms have 32 groups: with 32 channels, each channel is a group of its own, and its mean, which is where a prompt
# or a time says anything to a whole map, is taken away. From 64 on, differences within a group survive.
UNET = UNetSpec(channels=64, channel_mult=(1, 1, 1, 2), context_dim=128)
PREDICTION = "v"
SIZE = 128
CROP = 64
# Latent diffusion sees mostly one large thing, upright and in the middle: what a short training can learn.
SCENES = Distribution(
    counts=(0.88, 0.10, 0.02),
    graded=0.15,
    small=0.05,
    large=0.75,
    middle_size=(0.55, 0.65),
    large_size=(0.72, 0.86),
    shift=0.01,
    turned=0.1,
    turn=10.0,
    flipped=0.0,
)
# What is left to tell scenes apart by when their colour is the same: batches of such teach the text tower its nouns.
ALONE = Distribution(counts=(1.0, 0.0, 0.0), two_colours=0.0)
SHORT = 40  # tokens of the longest caption, its ends included: what follows is the end, again and again
NEUTRAL = 0  # a token that no caption holds


class Scenes:
    """The recipe's pictures and captions by number, as tensors."""

    def __init__(self) -> None:
        self.things = load_things()
        self.glyphs = Glyphs()
        self.tokenizer = Tokenizer()

    def batch(
        self, seed: int, first: int, count: int, size: int = SIZE, distribution: Distribution = FIRST_STAGE
    ) -> tuple[Tensor, list[str]]:
        """(images (count, 3, size, size) in [-1, 1], captions) of the samples from `first` on."""
        samples = [sample(seed, index, self.things, distribution) for index in range(first, first + count)]
        return self.drawn(samples, size)

    def drawn(self, samples: Sequence[Sample], size: int) -> tuple[Tensor, list[str]]:
        pixels = np.stack([np.asarray(render(each.scene, self.glyphs, size)) for each in samples])
        return _as_images(pixels), [each.caption for each in samples]

    def alike(self, seed: int, number: int, count: int) -> list[Sample]:
        """`count` scenes that only their things tell apart: one thing each, all different, on one colour."""
        order = torch.randperm(len(self.things), generator=chance(seed, number))[:count].tolist()
        colour = (COLOURS[number // 2 % len(COLOURS)],)
        return [
            sample(seed, number * count + index, (self.things[thing],), ALONE, colour)
            for index, thing in enumerate(order)
        ]

    def strewn(self, tokens: Tensor, chances: torch.Generator) -> Tensor:
        """Half the captions (B, N) with words between theirs that nobody taught, which are neutral (zero vectors).

        So a word that is not known moves the others along, and changes nothing else.
        """
        rows = []
        for row in tokens.tolist():
            if torch.rand((), generator=chances) < 0.5:
                for _ in range(int(torch.randint(1, 7, (), generator=chances))):
                    row.insert(int(torch.randint(1, row.index(self.tokenizer.end) + 1, (), generator=chances)), NEUTRAL)
            rows.append([*row[: tokens.shape[1] - 1], self.tokenizer.end])
        return torch.tensor(rows)

    def tokens(self, captions: Iterable[str], length: int) -> Tensor:
        """(B, length) int64: begin, words, end, and the end again as padding."""
        rows = []
        for caption in captions:
            words = self.tokenizer.encode(caption)[: length - 2]
            row = [self.tokenizer.begin, *words, self.tokenizer.end]
            rows.append(row + [self.tokenizer.end] * (length - len(row)))
        return torch.tensor(rows)

    def colours(self) -> start.Colours:
        return start.measure(self.batch(TRAINING_SEED, 0, 2000)[0])


def _as_images(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def new_vae(colours: start.Colours) -> Autoencoder:
    torch.manual_seed(1)
    vae = Autoencoder(VAE)
    start.prepare(vae, colours)
    return vae.to(memory_format=torch.channels_last)


def train_vae(scenes: Scenes, settings: Settings, folder: Path, seconds: float, begin: ModelFile | None) -> Result:
    colours = scenes.colours()
    vae = new_vae(colours)
    if begin is not None:
        vae.load_state_dict(part_of(begin, "vae"))
    objective = Reconstruction(vae, settings.seed, autocast=True, own_groups=tuple(start.groups(vae, encoder=False)))

    def batches(number: int) -> Pictures:
        whole, _ = scenes.batch(TRAINING_SEED, number * settings.batch, settings.batch)
        corners = torch.randint(0, (SIZE - CROP) // 8 + 1, (len(whole), 2), generator=chance(settings.seed, number)) * 8
        images = torch.stack([image[:, y : y + CROP, x : x + CROP] for image, (y, x) in zip(whole, corners.tolist())])
        return Pictures(images, start.latents(images, colours))

    unseen, _ = scenes.batch(VALIDATION_SEED, 0, 32)

    @torch.no_grad()
    def validate() -> Mapping[str, float]:
        back = vae.decode(start.latents(unseen, colours))
        return {"loss": -float(psnr(back, unseen).mean())}

    return train(objective, batches, settings, folder, on_log=_tell, validate=validate, seconds=seconds)


def new_text(scenes: Scenes) -> ClipText:
    """A text tower whose tokens are neutral (zero) where no caption of the recipe can hold them."""
    torch.manual_seed(2)
    text = ClipText(TEXT)
    captions = (sample(TRAINING_SEED, index, scenes.things).caption for index in range(50_000))
    met = scenes.tokens(captions, SHORT).unique()
    table = text.text_model.embeddings.token_embedding.weight
    with torch.no_grad():
        table.zero_()
        table[met] = torch.randn(len(met), TEXT.width) * 0.1
        positions = text.text_model.embeddings.position_embedding.weight
        positions.mul_(0.1)
        positions[SHORT:] = 0
    return text


def train_text(scenes: Scenes, settings: Settings, folder: Path, seconds: float, begin: ModelFile | None) -> Result:
    if begin is not None:
        raise RequestError("start", "the text stage cannot begin from a model file: its image tower is not in there")
    text = new_text(scenes)
    vision = ClipVision(VISION)
    with torch.no_grad():
        vision.vision_model.embeddings.position_embedding.weight.mul_(0.1)
    text.text_model.embeddings.token_embedding.weight.register_hook(_keep_neutral)
    objective = Telling(Contrast(text, vision), Layout(TEXT.width, SIZE // 8))
    colours = scenes.colours()

    def pairs(seed: int, number: int) -> Laid:
        if number % 2:  # a caption's end is all that the contrast reads: no more tokens than it has
            images, captions = scenes.drawn(scenes.alike(seed, number, settings.batch), VISION.image_size)
            return Laid(images, scenes.strewn(scenes.tokens(captions, SHORT), chance(seed, number)))
        images, captions = scenes.batch(seed, number * settings.batch, settings.batch, SIZE, SCENES)
        tokens = scenes.strewn(scenes.tokens(captions, TEXT.positions), chance(seed, number))
        small = F.interpolate(images, (VISION.image_size, VISION.image_size), mode="area")
        return Laid(small, tokens, start.latents(images, colours) * start.LATENT_SCALE)

    unseen = [pairs(VALIDATION_SEED, number) for number in range(8)]

    @torch.no_grad()
    def validate() -> Mapping[str, float]:
        losses = [objective.losses(batch, 0) for batch in unseen]
        told = {name: [each[name] for each in losses if name in each] for name in losses[0]}
        return {name: float(torch.stack(values).mean()) for name, values in told.items()}

    batches = lambda number: pairs(TRAINING_SEED, number)  # noqa: E731
    return train(objective, batches, settings, folder, on_log=_tell, validate=validate, seconds=seconds)


def train_layout(scenes: Scenes, settings: Settings, folder: Path, seconds: float, begin: ModelFile | None) -> Result:
    """The text tower learns on, from what the text stage left, to tell layouts and nothing else."""
    if begin is not None:
        raise RequestError("start", "the layout stage cannot begin from a model file: it goes on from the text stage")
    text, layout = ClipText(TEXT), Layout(TEXT.width, SIZE // 8)
    text.load_state_dict(averaged(folder.parent / "text", "text"))
    layout.load_state_dict(averaged(folder.parent / "text", "layout"))
    text.text_model.embeddings.token_embedding.weight.register_hook(_keep_neutral)
    objective = Spelling(text, layout)
    colours = scenes.colours()

    def laid(seed: int, number: int) -> Laid:
        images, captions = scenes.batch(seed, number * settings.batch, settings.batch, SIZE, SCENES)
        tokens = scenes.strewn(scenes.tokens(captions, TEXT.positions), chance(seed, number))
        return Laid(images, tokens, start.latents(images, colours) * start.LATENT_SCALE)

    unseen = [laid(VALIDATION_SEED, number) for number in range(8)]

    @torch.no_grad()
    def validate() -> Mapping[str, float]:
        return {"loss": float(torch.stack([objective.losses(batch, 0)["loss"] for batch in unseen]).mean())}

    batches = lambda number: laid(TRAINING_SEED, 100_000 + number)  # noqa: E731 - others than the text stage saw
    return train(objective, batches, settings, folder, on_log=_tell, validate=validate, seconds=seconds)


def _keep_neutral(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[NEUTRAL] = 0
    return gradient


def trained_text(folder: Path, begin: ModelFile | None) -> ClipText:
    """The text tower of a model file, or the average of a finished stage, frozen."""
    text = ClipText(TEXT if begin is None else replace(TEXT, projection=None))
    text.load_state_dict(averaged(folder, "text") if begin is None else part_of(begin, "text"))
    return text.requires_grad_(False).eval()


@torch.no_grad()
def new_unet(unet: UNet, layout: Layout, captioned: Callable[[int], Captioned], schedule: Schedule, seed: int) -> None:
    """Set where the U-Net starts, from what the text tower says in some batches."""
    batches = [captioned(number) for number in range(4)]
    listening.prepare(unet, batches[0].said.context)
    whereabouts.prepare(unet)
    told = layout_start.said(layout, torch.cat([batch.said.context.mean(1) for batch in batches]))
    with torch.enable_grad():
        drawing = layout_start.fit(told)
    layout_start.prepare(unet, told, drawing)

    def noised(number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, part, chances = batches[number // 8], slice(number % 8 * 62, number % 8 * 62 + 62), chance(seed, number)
        latents, context = batch.latents[part], batch.said.context[part]
        times = torch.randint(len(schedule.sigmas), (len(latents),), generator=chances)
        asked: list[Tensor] = []

        def network(x: Tensor, time: Tensor) -> Tensor:
            asked.extend((x, time))
            return torch.zeros_like(x)

        noise = torch.randn(latents.shape, generator=chances)
        _, wanted = Denoiser(network, schedule, PREDICTION).loss_terms(latents, noise, schedule.sigma(times))
        return asked[0], asked[1], context, wanted

    layout_start.read_out(unet, noised, 8 * len(batches))


def train_unet(scenes: Scenes, settings: Settings, folder: Path, seconds: float, begin: ModelFile | None) -> Result:
    text = trained_text(folder.parent / "layout", begin)
    colours = scenes.colours()

    @torch.no_grad()
    def said(tokens: Tensor) -> Conditioning:
        return Conditioning(text(tokens).last)

    def captioned(seed: int, first: int, count: int) -> Captioned:
        images, captions = scenes.batch(seed, first, count, distribution=SCENES)
        tokens = scenes.strewn(scenes.tokens(captions, TEXT.positions), chance(seed, first))
        return Captioned(start.latents(images, colours) * start.LATENT_SCALE, said(tokens))

    torch.manual_seed(3)
    unet = UNet(UNET).to(memory_format=torch.channels_last)
    schedule = Schedule.scaled_linear()
    if begin is not None:
        unet.load_state_dict(part_of(begin, "unet"))
    elif state.newest(folder) is None:  # a run that goes on has its weights
        layout = Layout(TEXT.width, SIZE // 8)
        layout.load_state_dict(averaged(folder.parent / "layout", "layout"))
        new_unet(unet, layout, lambda number: captioned(TRAINING_SEED, 500 * number, 500), schedule, settings.seed)
    objective = Denoising(
        unet, schedule, PREDICTION, said(scenes.tokens([""], TEXT.positions)), settings.seed, weighting="velocity"
    )

    # Unseen scenes, each at eight fixed times under fixed noise.
    unseen = captioned(VALIDATION_SEED, 0, 128)
    noise = torch.randn(unseen.latents.shape, generator=chance(settings.seed, -1))
    times = (torch.arange(8) * 125 + 62).repeat(16)
    loud = torch.zeros(len(times), dtype=torch.bool)

    @torch.no_grad()
    def validate() -> Mapping[str, float]:
        loss = objective.loss(unseen, times, noise, loud)
        return {"loss": float(loss.mean())}

    return train(
        objective,
        lambda number: captioned(TRAINING_SEED, number * settings.batch, settings.batch),
        settings,
        folder,
        on_log=_tell,
        validate=validate,
        seconds=seconds,
    )


PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.transformer."}


def part_of(file: ModelFile, network: str) -> dict[str, Tensor]:
    """One network's weights out of a bundled model file, in float32."""
    prefix = PREFIXES[network]
    return {name.removeprefix(prefix): file.tensor(name).float() for name in file if name.startswith(prefix)}


def averaged(folder: Path, network: str) -> dict[str, Tensor]:
    """The weights of `network` in the newest checkpoint of a stage, averages where they were trained."""
    found = state.newest(folder)
    if found is None:
        raise RequestError("stage", f"{folder} holds no checkpoint yet; train that stage first")
    weights = {**found.tensors["weights"], **found.tensors.get("ema", {})}
    return {
        name.removeprefix(f"{network}."): value for name, value in weights.items() if name.startswith(f"{network}.")
    }


def _tell(progress: Progress) -> None:
    losses = "  ".join(f"{name} {value:.4f}" for name, value in progress.losses.items())
    left = progress.left / 60
    print(f"step {progress.step}/{progress.steps}  {losses}  {progress.seconds:.0f} s, {left:.0f} min left", flush=True)


STAGES = {"vae": train_vae, "text": train_text, "layout": train_layout, "unet": train_unet}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["all", *STAGES])
    parser.add_argument("--folder", type=Path, default=Path("runs/mini"))
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop and save after so long")
    parser.add_argument("--start", type=Path, help="a bundled model file to begin from")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        scenes, begin = Scenes(), None if options.start is None else open_model(options.start)
        for stage in STAGES if options.stage == "all" else [options.stage]:
            settings = read(Path(__file__).with_name("recipe.toml"), stage)
            result = STAGES[stage](scenes, settings, options.folder / stage, options.seconds, begin)
            print(f"{stage}: step {result.step}, {'finished' if result.finished else 'stopped; run again to go on'}")
            if not result.finished:
                break
    except GouacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

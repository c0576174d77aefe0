"""Whole pictures against diffusers' pipelines, with the same weights and the same noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import gouache
from gouache import Model, Picture
from gouache.app.settings import Settings
from gouache.diffusion.noise import Noise
from tests.marks import usual
from tests.pipelines import SPACINGS, Narrow, scheduler
from tests.prompt_definition import context, plain, pooled

SEED, SIZE = 4, (96, 64)
LATENT = (4, 8, 12)
PROMPT, NEGATIVE = "a red apple on a blue table", "dog, lowres"
OPTIONS: dict[str, Any] = {"negative": NEGATIVE, "steps": 20, "cfg": 7.0, "seed": SEED, "size": SIZE}

# Each family, and each sampler.
PAIRS = usual(itertools.product(("sd1", "sd2", "sdxl"), SPACINGS), list(zip(("sd1", "sd2", "sdxl"), SPACINGS)))
Narrows = Callable[[str], Narrow]
Models = Callable[[str], Model]


def paint(model: Model, prompt: str = PROMPT, **options: Any) -> Picture:
    return next(model.paint(prompt, **OPTIONS | options))


def run_diffusers(pipeline: Any, prompt: str | None = PROMPT, **options: Any) -> tuple[Tensor, Tensor]:
    """(the final latent (C, h, w), its pixels (3, H, W) in [0, 1]) of one run of the pipeline."""
    latents: list[Tensor] = []

    def keep(_: Any, index: int, time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(values["latents"][0])
        return values

    default = {"negative_prompt": NEGATIVE, "num_inference_steps": 20, "guidance_scale": 7.0, "output_type": "pt"}
    pixels = pipeline(prompt, **default | options, callback_on_step_end=keep).images[0]
    return latents[-1], pixels


def assert_agrees(picture: Picture, model: Model, latent: Tensor, pixels: Tensor) -> None:
    torch.testing.assert_close(picture.latent, latent, atol=1e-3, rtol=0)
    decoded = (model.decode(picture.latent[None])[0] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, pixels, atol=1e-3, rtol=0)
    levels = (pixels * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(picture.image, np.float32) - levels).max() <= 1


def starting_noise(pipeline: Any, sampler: str) -> Tensor:
    """The `latents` argument of diffusers with which both start from the same x; its scheduler scales it.

    Euler receives noise and multiplies by sigma, as in Gouache. DDIM starts from the noise itself, at
    x / sqrt(1 + sigma^2): as in Gouache. So does diffusers' DPM++ 2M, but A1111's and Gouache's start from
    sigma * noise in the scale of x, which is sigma / sqrt(1 + sigma^2) * noise in that of diffusers.
    """
    noise = Noise([SEED], LATENT).start()
    if sampler == "DPM++ 2M":
        return noise * (1 - pipeline.scheduler.alphas_cumprod[-1]).sqrt()
    return noise


def networks(model: Model) -> list[torch.nn.Module]:
    return [model.unet, model.vae, *model.text_encoders.values()]


@pytest.fixture
def posterior_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers samples a latent from the encoder's distribution; here it uses the mean, as Gouache does."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An init picture: smooth waves in three colours."""
    width, height = SIZE
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 7), np.cos(y / 9), np.sin((x + y) / 11)]
    path = tmp_path_factory.mktemp("pictures") / "pattern.png"
    Image.fromarray(np.stack([(wave * 100 + 128).astype(np.uint8) for wave in waves], axis=2)).save(path)
    return path


@pytest.fixture(scope="module")
def mask(pattern: Path) -> Path:
    """White in the middle, where to paint; its edges are between latent cells."""
    picture = Image.new("L", SIZE, 0)
    picture.paste(255, (21, 12, 71, 50))
    path = pattern.with_name("mask.png")
    picture.save(path)
    return path


@pytest.mark.parametrize(("family", "sampler"), PAIRS)
def test_text_to_image(family: str, sampler: str, narrow: Narrows, loaded: Models):
    pipeline, model = narrow(family).pipeline, loaded(family)
    pipeline.scheduler = scheduler(sampler, family)
    width, height = SIZE
    latents = starting_noise(pipeline, sampler)

    picture = paint(model, sampler=sampler, schedule=SPACINGS[sampler])

    expected = run_diffusers(pipeline, width=width, height=height, latents=latents)
    assert_agrees(picture, model, *expected)


@pytest.mark.parametrize(("family", "sampler"), PAIRS)
def test_image_to_image(
    family: str, sampler: str, pattern: Path, narrow: Narrows, loaded: Models, posterior_mean: None
):
    import diffusers

    kind = diffusers.StableDiffusionXLImg2ImgPipeline if family == "sdxl" else diffusers.StableDiffusionImg2ImgPipeline
    parts = narrow(family).pipeline.components | {"scheduler": scheduler(sampler, family)}
    pipeline = kind(**parts, **({"add_watermarker": False} if family == "sdxl" else {"requires_safety_checker": False}))
    pipeline.set_progress_bar_config(disable=True)
    model = loaded(family)

    picture = paint(model, sampler=sampler, schedule=SPACINGS[sampler], init=pattern, strength=0.6, size=None)

    # A seed gives the same noise in diffusers, as long as nothing else is drawn from the generator.
    generator = torch.Generator().manual_seed(SEED)
    expected = run_diffusers(pipeline, image=Image.open(pattern), strength=0.6, generator=generator)
    assert_agrees(picture, model, *expected)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("sampler", SPACINGS)
def test_inpainting_with_an_inpainting_model(
    sampler: str, strength: float, pattern: Path, mask: Path, narrow: Narrows, loaded: Models, posterior_mean: None
):
    pipeline, model = narrow("sd1-inpainting").pipeline, loaded("sd1-inpainting")
    pipeline.scheduler = scheduler(sampler, "sd1-inpainting")
    (width, height), generator = SIZE, torch.Generator().manual_seed(SEED)
    from_noise = {"latents": starting_noise(pipeline, sampler)} if strength == 1 else {"generator": generator}

    picture = paint(
        model, sampler=sampler, schedule=SPACINGS[sampler], init=pattern, mask=mask, strength=strength, size=None
    )

    expected = run_diffusers(
        pipeline,
        image=Image.open(pattern),
        mask_image=Image.open(mask),
        strength=strength,
        width=width,
        height=height,
        **from_noise,
    )
    assert_agrees(picture, model, *expected)


def test_editing_by_instruction(pattern: Path, narrow: Narrows, loaded: Models):
    """Two guidance scales, three evaluations per step, and a picture whose latent is not scaled."""
    pipeline, model = narrow("sd1-edit").pipeline, loaded("sd1-edit")
    pipeline.scheduler = scheduler("Euler", "sd1-edit")

    picture = paint(model, sampler="Euler", init=pattern, strength=1.0, image_cfg=1.7, size=None)

    expected = run_diffusers(
        pipeline,
        image=Image.open(pattern),
        image_guidance_scale=1.7,
        latents=starting_noise(pipeline, "Euler"),
    )
    assert_agrees(picture, model, *expected)


@pytest.mark.parametrize(("family", "clip_skip"), [("sd1", 2), ("sdxl", 3)])
def test_clip_skip(family: str, clip_skip: int, narrow: Narrows, loaded: Models, monkeypatch: pytest.MonkeyPatch):
    """diffusers counts from the family's default layer: the last of SD1, the last but one of SDXL.

    It does not apply it to the negative prompt, so SD1's is passed encoded, and SDXL's is empty: zeros in both.
    """
    pipeline, model = narrow(family).pipeline, loaded(family)
    pipeline.scheduler = scheduler("Euler", family)
    if not hasattr(
        pipeline.text_encoder, "text_model"
    ):  # newer Transformers has no such attribute, but diffusers uses it
        monkeypatch.setitem(vars(pipeline.text_encoder), "text_model", pipeline.text_encoder)
    negative: dict[str, Any] = {"negative_prompt": None}
    if family == "sd1":
        encoded = context(pipeline.text_encoder, pipeline.tokenizer, [plain("dog , lowres")], layer=2, norm=True)
        negative["negative_prompt_embeds"] = encoded.float()

    picture = paint(model, sampler="Euler", steps=5, clip_skip=clip_skip, negative=NEGATIVE if family == "sd1" else "")

    expected = run_diffusers(
        pipeline,
        num_inference_steps=5,
        clip_skip=1,
        width=SIZE[0],
        height=SIZE[1],
        latents=starting_noise(pipeline, "Euler"),
        **negative,
    )
    assert_agrees(picture, model, *expected)


@pytest.mark.parametrize(
    ("family", "longer"),
    [("sd1", "prompt"), ("sd1", "negative"), ("sd2", "prompt"), ("sdxl", "prompt"), ("sdxl", "negative")],
)
def test_long_and_weighted_prompts(family: str, longer: str, narrow: Narrows, loaded: Models):
    """Three chunks against one, which is padded with the encoding of an empty prompt."""
    pipeline, model = narrow(family).pipeline, loaded(family)
    pipeline.scheduler = scheduler("Euler", family)
    long = "a (red:1.4) apple BREAK " + "cat " * 80
    long_chunks = [[("a", 1.0), ("red", 1.4), ("apple", 1.0)], plain("cat " * 75), plain("cat " * 5)]
    short, short_chunks = "dog, lowres", [plain("dog , lowres"), [], []]
    prompt, negative = (long, short) if longer == "prompt" else (short, long)
    positive_chunks, negative_chunks = (
        (long_chunks, short_chunks) if longer == "prompt" else (short_chunks, long_chunks)
    )

    picture = paint(model, prompt, negative=negative, sampler="Euler", steps=5)

    encoders = [(pipeline.text_encoder, pipeline.tokenizer)]
    if family == "sdxl":
        encoders.append((pipeline.text_encoder_2, pipeline.tokenizer_2))
    layer, norm = (2, False) if family == "sdxl" else (1, True)
    embeds = {
        name: torch.cat([context(*each, chunks, layer=layer, norm=norm) for each in encoders], dim=-1).float()
        for name, chunks in (("prompt_embeds", positive_chunks), ("negative_prompt_embeds", negative_chunks))
    }
    if family == "sdxl":
        embeds["pooled_prompt_embeds"] = pooled(*encoders[1], positive_chunks[0]).float()
        embeds["negative_pooled_prompt_embeds"] = pooled(*encoders[1], negative_chunks[0]).float()
    expected = run_diffusers(
        pipeline,
        None,
        negative_prompt=None,
        num_inference_steps=5,
        width=SIZE[0],
        height=SIZE[1],
        latents=starting_noise(pipeline, "Euler"),
        **embeds,
    )
    assert_agrees(picture, model, *expected)


@pytest.mark.parametrize("family", ["sd1", "sd1-inpainting", "sd2", "sdxl"])
def test_a_folder_gives_the_picture_of_its_single_file(
    family: str, narrow: Narrows, loaded: Models, settings: Settings
):
    folder, file = gouache.load(narrow(family).folder, settings=settings), loaded(family)

    from_folder, from_file = (paint(model, steps=2) for model in (folder, file))

    assert folder.file.format == "diffusers folder" and file.file.format == "safetensors"
    for ours, theirs in zip(networks(folder), networks(file)):
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    # Not always bit-equal, since a weight that a layout transposes uses another kernel.
    spread = from_file.latent.std()
    torch.testing.assert_close(from_folder.latent / spread, from_file.latent / spread, rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", [{"prompt": "a green pear"}, {"negative": "cat"}, {"seed": 5}, {"cfg": 6.5}])
def test_these_comparisons_detect_a_wrong_setting(change: dict[str, Any], loaded: Models):
    """A wrong word, seed or scale changes the latent of a narrow model by far more than the tolerance of 1e-3."""
    base, other = (paint(loaded("sd1"), steps=5, **options) for options in ({}, change))

    assert (base.latent - other.latent).abs().max() > 0.1

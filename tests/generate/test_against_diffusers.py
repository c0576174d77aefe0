"""From the prompt to the pixels against diffusers' whole pipelines, on the same weights and the same noise."""

from __future__ import annotations

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
from tests.pipelines import SPACINGS, Narrow, scheduler
from tests.prompt_definition import context, plain, pooled

SEED, SIZE = 4, (96, 64)
LATENT = (4, 8, 12)
PROMPT, NEGATIVE = "a red apple on a blue table", "dog, lowres"
KNOBS: dict[str, Any] = {"negative": NEGATIVE, "steps": 20, "cfg": 7.0, "seed": SEED, "size": SIZE}

Narrows = Callable[[str], Narrow]
Models = Callable[[str], Model]


def paint(model: Model, prompt: str = PROMPT, **knobs: Any) -> Picture:
    return next(model.paint(prompt, **KNOBS | knobs))


def diffusers_paints(pipeline: Any, prompt: str | None = PROMPT, **options: Any) -> tuple[Tensor, Tensor]:
    """(the final latent (C, h, w), its pixels (3, H, W) in [0, 1]) of one run of the whole pipeline."""
    seen: list[Tensor] = []

    def keep(_: Any, index: int, time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(values["latents"][0])
        return values

    usual = {"negative_prompt": NEGATIVE, "num_inference_steps": 20, "guidance_scale": 7.0, "output_type": "pt"}
    pixels = pipeline(prompt, **usual | options, callback_on_step_end=keep).images[0]
    return seen[-1], pixels


def assert_agrees(picture: Picture, model: Model, latent: Tensor, pixels: Tensor) -> None:
    torch.testing.assert_close(picture.latent, latent, atol=1e-3, rtol=0)
    decoded = (model.decode(picture.latent[None])[0] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, pixels, atol=1e-3, rtol=0)
    levels = (pixels * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(picture.image, np.float32) - levels).max() <= 1


def starting_noise(pipeline: Any, sampler: str) -> Tensor:
    """What diffusers takes as `latents` so that both start from the same x: it scales them as the scheduler asks.

    Euler is handed noise and multiplies by sigma, as we do. DDIM starts from noise as it is, at x / sqrt(1 + sigma^2):
    as we do. So does diffusers' DPM++ 2M, whereas A1111's and ours starts from sigma * noise in the scale of x, which
    is sigma / sqrt(1 + sigma^2) in that of diffusers.
    """
    noise = Noise([SEED], LATENT).start()
    if sampler == "DPM++ 2M":
        return noise * (1 - pipeline.scheduler.alphas_cumprod[-1]).sqrt()
    return noise


def networks(model: Model) -> list[torch.nn.Module]:
    return [model.unet, model.vae, *model.text_encoders.values()]


@pytest.fixture
def posterior_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers draws a picture's latent from the encoder's Gaussian; here it takes the mean, as Gouache does."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture to start from: a soft pattern in three colours."""
    width, height = SIZE
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 7), np.cos(y / 9), np.sin((x + y) / 11)]
    path = tmp_path_factory.mktemp("drawings") / "drawing.png"
    Image.fromarray(np.stack([(wave * 100 + 128).astype(np.uint8) for wave in waves], axis=2)).save(path)
    return path


@pytest.fixture(scope="module")
def mask(drawing: Path) -> Path:
    """White in the middle, where to paint; its edges fall between latent cells."""
    picture = Image.new("L", SIZE, 0)
    picture.paste(255, (21, 12, 71, 50))
    path = drawing.with_name("mask.png")
    picture.save(path)
    return path


@pytest.mark.parametrize("sampler", SPACINGS)
@pytest.mark.parametrize("line", ["sd1", "sd2", "sdxl"])
def test_text_to_image(line: str, sampler: str, narrow: Narrows, loaded: Models):
    pipeline, model = narrow(line).pipeline, loaded(line)
    pipeline.scheduler = scheduler(sampler, line)
    width, height = SIZE
    latents = starting_noise(pipeline, sampler)

    picture = paint(model, sampler=sampler, schedule=SPACINGS[sampler])

    expected = diffusers_paints(pipeline, width=width, height=height, latents=latents)
    assert_agrees(picture, model, *expected)


@pytest.mark.parametrize("sampler", SPACINGS)
@pytest.mark.parametrize("line", ["sd1", "sd2", "sdxl"])
def test_image_to_image(line: str, sampler: str, drawing: Path, narrow: Narrows, loaded: Models, posterior_mean: None):
    import diffusers

    kind = diffusers.StableDiffusionXLImg2ImgPipeline if line == "sdxl" else diffusers.StableDiffusionImg2ImgPipeline
    parts = narrow(line).pipeline.components | {"scheduler": scheduler(sampler, line)}
    pipeline = kind(**parts, **({"add_watermarker": False} if line == "sdxl" else {"requires_safety_checker": False}))
    pipeline.set_progress_bar_config(disable=True)
    model = loaded(line)

    picture = paint(model, sampler=sampler, schedule=SPACINGS[sampler], init=drawing, strength=0.6, size=None)

    # A seed means the same noise to diffusers, as long as it draws nothing else from the generator.
    generator = torch.Generator().manual_seed(SEED)
    expected = diffusers_paints(pipeline, image=Image.open(drawing), strength=0.6, generator=generator)
    assert_agrees(picture, model, *expected)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("sampler", SPACINGS)
def test_inpainting_with_an_inpainting_model(
    sampler: str, strength: float, drawing: Path, mask: Path, narrow: Narrows, loaded: Models, posterior_mean: None
):
    pipeline, model = narrow("sd1-inpainting").pipeline, loaded("sd1-inpainting")
    pipeline.scheduler = scheduler(sampler, "sd1-inpainting")
    (width, height), generator = SIZE, torch.Generator().manual_seed(SEED)
    from_noise = {"latents": starting_noise(pipeline, sampler)} if strength == 1 else {"generator": generator}

    picture = paint(
        model, sampler=sampler, schedule=SPACINGS[sampler], init=drawing, mask=mask, strength=strength, size=None
    )

    expected = diffusers_paints(
        pipeline,
        image=Image.open(drawing),
        mask_image=Image.open(mask),
        strength=strength,
        width=width,
        height=height,
        **from_noise,
    )
    assert_agrees(picture, model, *expected)


def test_editing_by_instruction(drawing: Path, narrow: Narrows, loaded: Models):
    """Two guidance scales, three passes a step, and a picture's latent that is not scaled."""
    pipeline, model = narrow("sd1-edit").pipeline, loaded("sd1-edit")
    pipeline.scheduler = scheduler("Euler", "sd1-edit")

    picture = paint(model, sampler="Euler", init=drawing, strength=1.0, image_cfg=1.7, size=None)

    expected = diffusers_paints(
        pipeline,
        image=Image.open(drawing),
        image_guidance_scale=1.7,
        latents=starting_noise(pipeline, "Euler"),
    )
    assert_agrees(picture, model, *expected)


@pytest.mark.parametrize(("line", "ours"), [("sd1", 2), ("sdxl", 3)])
def test_clip_skip(line: str, ours: int, narrow: Narrows, loaded: Models, monkeypatch: pytest.MonkeyPatch):
    """diffusers counts from the layer that a family usually reads: SD1's last, SDXL's last but one.

    It leaves the negative prompt alone, so SD1's is handed to it encoded, and SDXL's is none: zeros for both.
    """
    pipeline, model = narrow(line).pipeline, loaded(line)
    pipeline.scheduler = scheduler("Euler", line)
    if not hasattr(pipeline.text_encoder, "text_model"):  # newer Transformers dropped it, and diffusers asks for it
        monkeypatch.setitem(vars(pipeline.text_encoder), "text_model", pipeline.text_encoder)
    told: dict[str, Any] = {"negative_prompt": None}
    if line == "sd1":
        said = context(pipeline.text_encoder, pipeline.tokenizer, [plain("dog , lowres")], layer=2, norm=True)
        told["negative_prompt_embeds"] = said.float()

    picture = paint(model, sampler="Euler", steps=5, clip_skip=ours, negative=NEGATIVE if line == "sd1" else "")

    expected = diffusers_paints(
        pipeline,
        num_inference_steps=5,
        clip_skip=1,
        width=SIZE[0],
        height=SIZE[1],
        latents=starting_noise(pipeline, "Euler"),
        **told,
    )
    assert_agrees(picture, model, *expected)


@pytest.mark.parametrize(
    ("line", "longer"),
    [("sd1", "prompt"), ("sd1", "negative"), ("sd2", "prompt"), ("sdxl", "prompt"), ("sdxl", "negative")],
)
def test_long_and_weighted_prompts(line: str, longer: str, narrow: Narrows, loaded: Models):
    """Three chunks against one, which is filled up with the encoding of no words."""
    pipeline, model = narrow(line).pipeline, loaded(line)
    pipeline.scheduler = scheduler("Euler", line)
    long = "a (red:1.4) apple BREAK " + "cat " * 80
    long_chunks = [[("a", 1.0), ("red", 1.4), ("apple", 1.0)], plain("cat " * 75), plain("cat " * 5)]
    short, short_chunks = "dog, lowres", [plain("dog , lowres"), [], []]
    prompt, negative = (long, short) if longer == "prompt" else (short, long)
    wanted, unwanted = (long_chunks, short_chunks) if longer == "prompt" else (short_chunks, long_chunks)

    picture = paint(model, prompt, negative=negative, sampler="Euler", steps=5)

    encoders = [(pipeline.text_encoder, pipeline.tokenizer)]
    if line == "sdxl":
        encoders.append((pipeline.text_encoder_2, pipeline.tokenizer_2))
    layer, norm = (2, False) if line == "sdxl" else (1, True)
    told = {
        name: torch.cat([context(*each, said, layer=layer, norm=norm) for each in encoders], dim=-1).float()
        for name, said in (("prompt_embeds", wanted), ("negative_prompt_embeds", unwanted))
    }
    if line == "sdxl":
        told["pooled_prompt_embeds"] = pooled(*encoders[1], wanted[0]).float()
        told["negative_pooled_prompt_embeds"] = pooled(*encoders[1], unwanted[0]).float()
    expected = diffusers_paints(
        pipeline,
        None,
        negative_prompt=None,
        num_inference_steps=5,
        width=SIZE[0],
        height=SIZE[1],
        latents=starting_noise(pipeline, "Euler"),
        **told,
    )
    assert_agrees(picture, model, *expected)


@pytest.mark.parametrize("line", ["sd1", "sd1-inpainting", "sd2", "sdxl"])
def test_the_folder_paints_what_its_single_file_paints(line: str, narrow: Narrows, loaded: Models, settings: Settings):
    folder, file = gouache.load(narrow(line).folder, settings=settings), loaded(line)

    picture, same = (paint(model, steps=2) for model in (folder, file))

    assert folder.file.format == "diffusers folder" and file.file.format == "safetensors"
    for ours, theirs in zip(networks(folder), networks(file)):
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    # Not always to the last bit, since a weight that a layout transposes goes through another kernel.
    spread = same.latent.std()
    torch.testing.assert_close(picture.latent / spread, same.latent / spread, rtol=0, atol=1e-4)


@pytest.mark.parametrize("knob", [{"prompt": "a green pear"}, {"negative": "cat"}, {"seed": 5}, {"cfg": 6.5}])
def test_what_these_comparisons_would_see(knob: dict[str, Any], loaded: Models):
    """A wrong word, seed or scale moves a narrow model's latent by far more than the 1e-3 that is allowed."""
    base, other = (paint(loaded("sd1"), steps=5, **knobs) for knobs in ({}, knob))

    assert (base.latent - other.latent).abs().max() > 0.1

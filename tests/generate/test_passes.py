"""Hires fix, refiner, scheduled prompts and AND, against diffusers' pipelines combined by hand."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import gouache
from gouache import Model, Picture
from gouache.app.repaint import repaint
from gouache.app.settings import Settings
from gouache.diffusion.noise import Noise
from gouache.errors import RequestError
from gouache.generate.passes import Guided, plan_passes
from gouache.generate.request import Request
from gouache.model.lease import Lease
from tests.marks import usual
from tests.pipelines import Narrow, altered, scheduler

SIZE, LARGER = (64, 64), (96, 128)
OPTIONS: dict[str, Any] = {"negative": "dog", "steps": 8, "cfg": 5.0, "seed": 4, "size": SIZE, "sampler": "Euler"}
DIFFUSERS_OPTIONS: dict[str, Any] = {
    "negative_prompt": "dog", "num_inference_steps": 8, "guidance_scale": 5.0, "output_type": "latent",
    "width": SIZE[0], "height": SIZE[1],
}  # fmt: skip

Narrows = Callable[[str], Narrow]


def paint(model: Model, prompt: str = "a red cat", **options: Any) -> Picture:
    return next(model.paint(prompt, **OPTIONS | options))


def start(size: tuple[int, int] = SIZE) -> Tensor:
    """The starting noise of the seed."""
    return Noise([4], (4, size[1] // 8, size[0] // 8)).start()


def pipeline(narrow: Narrows, family: str) -> Any:
    found = narrow(family).pipeline
    found.scheduler = scheduler("Euler", family)
    return found


def image_to_image(text_to_image: Any, family: str, monkeypatch: pytest.MonkeyPatch, noise: Tensor) -> Any:
    """diffusers' image-to-image on the same networks, which adds `noise` to the latent that it starts from."""
    import diffusers
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as sd
    from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img as xl

    for module in (sd, xl):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
    kind = diffusers.StableDiffusionXLImg2ImgPipeline if family == "sdxl" else diffusers.StableDiffusionImg2ImgPipeline
    options = {} if family == "sdxl" else {"requires_safety_checker": False}
    result = kind(**{**text_to_image.components, **({} if family == "sdxl" else {"image_encoder": None})}, **options)
    result.set_progress_bar_config(disable=True)
    return result


@pytest.mark.parametrize(("family", "upscaler"), [("sd1", "latent"), ("sd1", "nearest-exact"), ("sdxl", "bicubic")])
def test_hires_fix_is_image_to_image_from_the_enlarged_latent(
    family: str, upscaler: str, narrow: Narrows, models: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
):
    """For 5 steps at strength 0.5, A1111 spaces 10 steps and runs the last 5."""
    theirs = pipeline(narrow, family)
    first = theirs("a red cat", latents=start(), **DIFFUSERS_OPTIONS).images
    mode = {"latent": "bilinear"}.get(upscaler, upscaler)
    enlarged = F.interpolate(first, size=(LARGER[1] // 8, LARGER[0] // 8), mode=mode)
    second = image_to_image(theirs, family, monkeypatch, start(LARGER))
    options = DIFFUSERS_OPTIONS | {"num_inference_steps": 10, "strength": 0.5, "image": enlarged}
    if family == "sdxl":
        options |= {"original_size": LARGER[::-1], "target_size": LARGER[::-1]}
    expected = second("a blue cat", **{k: v for k, v in options.items() if k not in ("width", "height")}).images[0]

    picture = paint(
        models(family), hires=LARGER, hires_steps=5, hires_strength=0.5, hires_upscaler=upscaler,
        hires_prompt="a blue cat",
    )  # fmt: skip

    torch.testing.assert_close(picture.latent, expected, atol=2e-3, rtol=0)
    assert picture.image.size == LARGER


def test_hires_with_lanczos_and_factor_one_is_image_to_image_from_the_decoded_picture(models: Callable[[str], Model]):
    model = models("sd1")
    base = paint(model)

    twice = paint(model, hires=1.0, hires_steps=8, hires_strength=0.5, hires_upscaler="lanczos")

    # A run of 16 steps at strength 0.5 is the same 8 steps, from the same picture, on the same noise.
    again = paint(model, init=base.image, steps=16, strength=0.5)
    torch.testing.assert_close(twice.latent, again.latent, atol=1e-4, rtol=0)


def test_hires_sizes(models: Callable[[str], Model]):
    model = models("sd1")
    assert paint(model, hires=1.6, steps=2).image.size == (96, 96)  # 102 rounded down to a multiple of 8
    assert paint(model, hires="72x104", steps=2).image.size == (72, 104)
    with pytest.raises(RequestError, match="hires"):
        paint(model, hires="70x100")
    with pytest.raises(RequestError, match="hires"):
        paint(model, hires=0.5)
    with pytest.raises(RequestError, match="hires_strength"):
        paint(model, hires=2.0, hires_strength=0)


def test_a_refiner_runs_the_last_steps(narrow: Narrows, models: Callable[[str], Model], tmp_path: Path):
    """diffusers' ensemble of two experts: `denoising_end` of the base, `denoising_start` of the refiner."""
    import diffusers

    base = pipeline(narrow, "sdxl")

    def other(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.startswith("model.diffusion_model.") and tensor.ndim > 1:
                tensor.mul_(0.8)

    path = altered(narrow("sdxl").file, tmp_path / "refiner.safetensors", other)
    unet = copy.deepcopy(base.unet)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.8)
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**{**base.components, "unet": unet}, add_watermarker=False)
    refiner.set_progress_bar_config(disable=True)
    middle = base("a red cat", latents=start(), denoising_end=0.5, **DIFFUSERS_OPTIONS).images
    options = {key: value for key, value in DIFFUSERS_OPTIONS.items() if key not in ("width", "height")}
    expected = refiner(
        "a red cat", image=middle, denoising_start=0.5, original_size=SIZE, target_size=SIZE, **options
    ).images[0]

    picture = paint(models("sdxl"), refiner=str(path), refiner_at=0.5)

    torch.testing.assert_close(picture.latent, expected, atol=2e-3, rtol=0)
    assert re.search(r"Refiner: refiner \[[0-9a-f]{10}\], Refiner switch at: 0.5", picture.parameters)
    assert picture.recipe["refiner"]["name"] == "refiner"
    assert torch.equal(paint(models("sdxl"), refiner=str(path), refiner_at=1.0).latent, paint(models("sdxl")).latent)


@pytest.mark.parametrize(
    ("refiner_at", "counts"),
    [(0.0, [10]), (0.1, [1, 9]), (0.5, [5, 5]), (0.79, [8, 2]), (0.8, [8, 2]), (0.81, [9, 1]), (0.95, [10])],
)
def test_the_refiner_takes_over_where_a1111_and_diffusers_switch(
    refiner_at: float, counts: list[int], models: Callable[[str], Model]
):
    """Of the timesteps 999, 899, ..., 99 it runs those below 1000 * (1 - refiner_at): at 0.8 those from 199 on."""
    model = models("sdxl")
    request = Request(
        prompt="a cat", steps=10, size=SIZE, sampler="Euler", schedule="Simple", refiner="", refiner_at=refiner_at
    )
    guided = Guided("a cat", "", Lease(model))

    passes = plan_passes(model, request, guided, guided, lambda: model)

    assert [each.count for each in passes] == counts


def test_a_refiner_with_other_latents_is_refused(models: Callable[[str], Model], narrow: Narrows):
    with pytest.raises(gouache.GouacheError, match="cannot refine"):
        paint(models("sdxl"), refiner=str(narrow("sd1").file))


def scheduled_by_hand(narrow: Narrows, texts: list[str], sampler: str = "Euler") -> Tensor:
    """The latent of a diffusers run in which the prompt of step i is texts[i]."""
    theirs = pipeline(narrow, "sd1")
    with torch.inference_mode():
        encoded = {text: theirs.encode_prompt(text, "cpu", 1, True, negative_prompt="dog") for text in set(texts)}

    def change(_: Any, index: int, time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        positive, negative = encoded[texts[min(index + 1, len(texts) - 1)]]
        return {**values, "prompt_embeds": torch.cat([negative, positive])}

    return theirs(
        texts[0], latents=start(), callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], **DIFFUSERS_OPTIONS,
    ).images[0]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a [cat:bird:0.5]", ["a cat"] * 4 + ["a bird"] * 4),
        ("a [cat:bird:3]", ["a cat"] * 3 + ["a bird"] * 5),
        ("a [cat:bird:1.0]", ["a cat"] * 8),
        ("a [red :0.25]cat", ["a cat"] * 2 + ["a red cat"] * 6),
        ("a [red ::5]cat", ["a red cat"] * 5 + ["a cat"] * 3),
        ("a [red|blue|] cat", [f"a {['red', 'blue', ''][i % 3]} cat" for i in range(8)]),
        ("a [[red|blue] cat:bird:4]", ["a red cat", "a blue cat"] * 2 + ["a bird"] * 4),
    ],
)
def test_prompts_that_change_by_step(prompt: str, texts: list[str], narrow: Narrows, models: Callable[[str], Model]):
    picture = paint(models("sd1"), prompt)

    torch.testing.assert_close(picture.latent, scheduled_by_hand(narrow, texts), atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampler", ["Heun", "DPM2", "DPM++ 2S a", "DPM++ SDE", "DPM++ 2M", "PLMS", "UniPC", "LMS"])
def test_every_sampler_counts_steps_and_not_calls(
    sampler: str, models: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
):
    """Heun and others call the denoiser twice per step: the prompt changes at the first call of a step."""
    model = models("sd1")
    calls: list[tuple[float, bytes]] = []
    steps: list[float] = []
    denoise = type(model).denoise

    def watched(self: Model, x: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        calls.append((float(sigma.max()), conditioning.context[:1].numpy().tobytes()))
        return denoise(self, x, sigma, conditioning)

    monkeypatch.setattr(type(model), "denoise", watched)
    next(model.paint("a [cat:bird:4]", on_step=lambda step: steps.append(step.sigma), **OPTIONS | {"sampler": sampler}))

    first, last = calls[0][1], calls[-1][1]
    assert len(steps) == 8 and first != last
    switch = [text for _, text in calls].index(last)
    before, after = calls[:switch], calls[switch:]
    assert all(text == first for _, text in before) and all(text == last for _, text in after)
    assert after[0][0] == pytest.approx(steps[4], rel=1e-5)


def test_parts_joined_by_and_add_up_by_weight(narrow: Narrows, models: Callable[[str], Model]):
    """x0 = negative + scale * sum(weight * (part - negative)) on diffusers' network, with Euler's method."""
    theirs, model = pipeline(narrow, "sd1"), models("sd1")
    weights = {"a red cat": 1.0, "rain": 0.6, "a dog": -0.4}
    theirs.scheduler.set_timesteps(8)
    sigmas, x = theirs.scheduler.sigmas, start() * theirs.scheduler.sigmas[0]
    with torch.inference_mode():
        texts = [theirs.encode_prompt(text, "cpu", 1, False)[0] for text in ("dog", *weights)]
        for sigma, sigma_next, time in zip(sigmas, sigmas[1:], theirs.scheduler.timesteps):
            negative, *parts = (theirs.unet(x / (sigma**2 + 1).sqrt(), time, each).sample for each in texts)
            noise = negative + 5.0 * sum(w * (part - negative) for w, part in zip(weights.values(), parts))
            x = x + noise * (sigma_next - sigma)

    picture = paint(model, "a red cat AND rain :0.6 AND a dog:-0.4")

    torch.testing.assert_close(picture.latent, x[0], atol=2e-3, rtol=0)


def test_equal_texts_are_encoded_once(models: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch):
    model = models("sd1")
    encoded: list[str] = []
    encode = type(model).encode_prompts

    def watched(self: Model, texts: list[str], **options: Any) -> Any:
        encoded.extend(texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(type(model), "encode_prompts", watched)
    paint(model, "a cat AND a cat :0.5 AND a [cat|bird]")

    assert len(encoded) == len(set(encoded)) and {text.strip() for text in encoded} == {"a bird", "a cat", "dog"}


REPAINTED: list[dict[str, Any]] = [
    {"hires": 1.5, "hires_steps": 3, "hires_prompt": "a [cat:bird:1.5]", "hires_sampler": "Euler a"},
    {"hires": "96x64", "hires_upscaler": "lanczos", "hires_negative": "rain"},
    {"hires": 1.5, "hires_sampler": "Euler a", "sampler": "DPM++ 2M Exponential"},  # whose schedules differ
    {"hires": 1.5, "sampler": "DPM++ 2M", "hires_sampler": "Euler a"},
    {"hires": 1.5, "sampler": "DPM++ 2M Exponential", "hires_sampler": "Heun"},
    {"hires": 1.5, "hires_schedule": "Karras"},
    {"refiner": "sdxl", "refiner_at": 0.4},
    {"hires": 1.5, "hires_steps": 4, "refiner": "sdxl", "refiner_at": 0.8},
    {"init": True, "strength": 0.7, "hires": 1.5},
]


@pytest.mark.parametrize("options", usual(REPAINTED, [REPAINTED[0], *REPAINTED[6:]]))
def test_repaint_reproduces_requests_of_several_passes(
    options: dict[str, Any], narrow: Narrows, tmp_path: Path, settings: Settings
):
    family = "sdxl" if "refiner" in options else "sd1"
    if "refiner" in options:
        options = options | {"refiner": str(narrow("sdxl").file)}
    if "init" in options:
        Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / "init.png")
        options = options | {"init": tmp_path / "init.png"}
    model = gouache.load(narrow(family).file, device="cpu", dtype="fp32", settings=settings)

    path = paint(model, "a [red|blue] cat AND rain :0.3", **options).save(tmp_path / "picture.png")

    assert repaint(path, settings).identical


def test_progress_is_counted_over_all_passes(models: Callable[[str], Model]):
    steps: list[tuple[int, int]] = []

    next(
        models("sd1").paint(
            "a cat", hires=1.5, hires_steps=3, on_step=lambda step: steps.append((step.index, step.count)), **OPTIONS
        )
    )

    assert steps == [(index, 11) for index in range(11)]

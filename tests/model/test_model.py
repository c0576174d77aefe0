"""What a caller in Python reaches: the face, the networks, latents and pictures, a sampler on a denoiser of his own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import gouache
from gouache import Model, Request
from gouache.app.settings import Settings
from gouache.diffusion import guidance, spacing
from gouache.diffusion.noise import Noise
from gouache.diffusion.samplers.euler import euler
from gouache.errors import RequestError
from tests.nn.narrow import normal
from tests.pipelines import Narrow

Narrows = Callable[[str], Narrow]
Models = Callable[[str], Model]
KNOBS: dict[str, Any] = {"steps": 3, "seed": 3, "size": (64, 96), "negative": "dog", "sampler": "Euler"}


def test_the_face_has_what_it_says_and_nothing_else():
    assert all(getattr(gouache, name) is not None for name in gouache.__all__)
    assert dir(gouache) == sorted(gouache.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        gouache.lode  # noqa: B018


def test_the_three_lines_of_the_front_page(narrow: Narrows, settings: Settings, tmp_path: Path):
    model = gouache.load(narrow("sd1").file, settings=settings)
    for picture in model.paint("a cat", steps=2, seed=7):
        picture.save(tmp_path / "cat.png")

    assert Image.open(tmp_path / "cat.png").size == model.size == (64, 64)


def test_a_model_goes_by_its_name_in_a_model_folder(narrow: Narrows, settings: Settings):
    file = narrow("sd1").file

    model = gouache.load(file.stem, settings=replace(settings, models=(file.parent,)))

    assert model.file.path == file


def test_a_request_may_be_given_whole_and_changed_by_the_knob(loaded: Models):
    request = Request(prompt="a cat", **KNOBS)

    whole, changed = next(loaded("sd1").paint(request)), next(loaded("sd1").paint(request, seed=4))

    assert whole.image.tobytes() == next(loaded("sd1").paint("a cat", **KNOBS)).image.tobytes()
    assert (whole.seed, changed.seed) == (3, 4)


def test_a_wrong_knob_is_refused_when_it_is_given_not_when_it_is_used(loaded: Models):
    with pytest.raises(RequestError, match="stepps: is not a setting"):
        loaded("sd1").paint("a cat", stepps=3)


@pytest.mark.parametrize("line", ["sd1", "sd2", "sdxl"])
def test_a_sampler_on_a_denoiser_of_ones_own_paints_the_same_latent(line: str, loaded: Models):
    model = loaded(line)
    noise = Noise([3], (4, 12, 8))
    positive, negative = (
        model.encode_prompts([text], negative=is_negative, size=(64, 96))
        for text, is_negative in (("a cat", False), ("dog", True))
    )
    wanted, unwanted = model.denoiser(positive), model.denoiser(negative)
    sigmas = spacing.karras(model.schedule, 3)

    latent = euler(
        lambda x, sigma: unwanted(x, sigma) + 7 * (wanted(x, sigma) - unwanted(x, sigma)),
        noise.start() * sigmas[0],
        sigmas,
        noise=noise,
    )

    painted = next(model.paint("a cat", schedule="Karras", **KNOBS)).latent
    spread = painted.std()
    torch.testing.assert_close(latent[0] / spread, painted / spread, rtol=0, atol=1e-4)


def test_guidance_takes_the_model_as_it_is(loaded: Models):
    model = loaded("sd1")
    positive, negative = model.encode_prompts(["a cat"]), model.encode_prompts(["dog"], negative=True)
    x, sigma = normal(1, 4, 8, 8), torch.tensor(2.0)

    guided = guidance.cfg(model.denoise, positive, negative, 3.0)(x, sigma)

    wanted, unwanted = model.denoise(x, sigma, positive), model.denoise(x, sigma, negative)
    torch.testing.assert_close(guided, unwanted + 3 * (wanted - unwanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("line", ["sd1", "sdxl"])
def test_pictures_and_latents_go_over_into_each_other_as_in_diffusers(line: str, narrow: Narrows, loaded: Models):
    vae, model = narrow(line).pipeline.vae, loaded(line)
    images, latents = normal(2, 3, 64, 96).clamp(-1, 1), normal(2, 4, 8, 12)

    with torch.inference_mode():
        encoded = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
        decoded = vae.decode(latents / vae.config.scaling_factor).sample

    torch.testing.assert_close(model.encode(images), encoded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.decode(latents), decoded, rtol=1e-4, atol=1e-4)


def test_changing_a_network_changes_what_is_painted(narrow: Narrows, settings: Settings):
    model = gouache.load(narrow("sd1").file, settings=settings)
    before = next(model.paint("a cat", **KNOBS)).latent

    with torch.inference_mode():
        model.unet.get_parameter("out.2.bias").add_(0.5)

    assert (next(model.paint("a cat", **KNOBS)).latent - before).abs().mean() > 0.1
    file = gouache.load(narrow("sd1").file, settings=settings)
    assert torch.equal(next(file.paint("a cat", **KNOBS)).latent, before)  # the mapped file is as it was

"""The Python API: public names, networks, latents and pictures, a sampler on a denoiser of the caller's own."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import gouache
from gouache import Model, Request
from gouache.app import hashes, hashing
from gouache.app.settings import Settings
from gouache.diffusion import guidance, spacing
from gouache.diffusion.noise import Noise
from gouache.diffusion.samplers.euler import euler
from gouache.errors import FileError, RequestError
from gouache.files.record import ModelFile
from tests.nn.narrow import normal
from tests.pipelines import Narrow

Narrows = Callable[[str], Narrow]
Models = Callable[[str], Model]
OPTIONS: dict[str, Any] = {"steps": 3, "seed": 3, "size": (64, 96), "negative": "dog", "sampler": "Euler"}


def test_the_public_names_exist_and_are_the_only_ones():
    assert all(getattr(gouache, name) is not None for name in gouache.__all__)
    assert dir(gouache) == sorted(gouache.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        gouache.lode  # noqa: B018


def test_the_example_of_the_readme(narrow: Narrows, settings: Settings, tmp_path: Path):
    model = gouache.load(narrow("sd1").file, settings=settings)
    for picture in model.paint("a cat", steps=2, seed=7):
        picture.save(tmp_path / "cat.png")

    assert Image.open(tmp_path / "cat.png").size == model.size == (64, 64)


def test_a_model_is_loaded_by_its_name_in_a_model_folder(narrow: Narrows, settings: Settings):
    file = narrow("sd1").file

    model = gouache.load(file.stem, settings=replace(settings, models=(file.parent,)))

    assert model.file.path == file


def test_paint_accepts_a_request_and_options_that_replace_its_settings(loaded: Models):
    request = Request(prompt="a cat", **OPTIONS)

    whole, changed = next(loaded("sd1").paint(request)), next(loaded("sd1").paint(request, seed=4))

    assert whole.image.tobytes() == next(loaded("sd1").paint("a cat", **OPTIONS)).image.tobytes()
    assert (whole.seed, changed.seed) == (3, 4)


def test_an_invalid_option_is_refused_before_the_iteration_begins(loaded: Models):
    with pytest.raises(RequestError, match="stepps: is not a setting"):
        loaded("sd1").paint("a cat", stepps=3)


@pytest.mark.parametrize(
    ("setting", "misuse"),
    [
        ("vae", lambda model: setattr(model, "vae", 5)),
        ("strength", lambda model: model.attach(model.file, strength="0.5")),
        ("strength", lambda model: model.attach(model.file, strength=True)),
        ("strength", lambda model: model.attach(model.file, strength=None)),
        ("how", lambda model: model.attach(model.file, how="x")),
        ("model", pickle.dumps),
        ("model", copy.deepcopy),
        ("model", copy.copy),
        ("output", lambda model: next(model.paint("a cat", **OPTIONS)).save("folder/")),
        ("output", lambda model: next(model.paint("a cat", **OPTIONS)).save(model.file.path.parent)),
    ],
)
def test_misuse_is_refused_in_one_line_and_changes_nothing(
    setting: str, misuse: Callable[[Model], object], loaded: Models
):
    model = loaded("sd1")
    before = model.vae, model.vae_file, list(model.attached)

    with pytest.raises(RequestError) as refused:
        misuse(model)

    assert refused.value.setting == setting and "\n" not in str(refused.value)
    assert (model.vae, model.vae_file, list(model.attached)) == before


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_sampler_called_with_the_models_denoiser_gives_the_latent_of_paint(family: str, loaded: Models):
    model = loaded(family)
    noise = Noise([3], (4, 12, 8))
    positive, negative = (
        model.encode_prompts([text], negative=is_negative, size=(64, 96))
        for text, is_negative in (("a cat", False), ("dog", True))
    )
    conditional, unconditional = model.denoiser(positive), model.denoiser(negative)
    sigmas = spacing.karras(model.schedule, 3)

    latent = euler(
        lambda x, sigma: unconditional(x, sigma) + 7 * (conditional(x, sigma) - unconditional(x, sigma)),
        noise.start() * sigmas[0],
        sigmas,
        noise=noise,
    )

    painted = next(model.paint("a cat", schedule="Karras", **OPTIONS)).latent
    spread = painted.std()
    torch.testing.assert_close(latent[0] / spread, painted / spread, rtol=0, atol=1e-4)


def test_one_string_instead_of_a_list_of_prompts_is_refused(loaded: Models):
    with pytest.raises(
        RequestError, match=r"texts: 'a cat' is one string; give a list of prompts, \['a cat'\]"
    ) as caught:
        loaded("sd1").encode_prompts("a cat")

    assert "\n" not in str(caught.value)


def test_the_repr_of_a_model_is_one_short_line(loaded: Models):
    assert repr(loaded("sd1")) == "<Model sd1: Stable Diffusion 1, base, eps-prediction, cpu, fp32>"
    assert repr(loaded("sd2")).endswith(": Stable Diffusion 2, base, v-prediction, cpu, fp32>")
    for family in ("sdxl", "sd1-inpainting"):
        assert len(repr(loaded(family))) < 120 and "\n" not in repr(loaded(family))


def test_the_hash_of_the_model_does_not_delay_the_first_step(
    narrow: Narrows, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    """It is computed beside the steps, and reported while it is waited for."""
    model = gouache.load(narrow("sd1").file, settings=settings)
    stepped, reports = threading.Event(), list[tuple[str, int, int]]()

    def slow(file: ModelFile, settings: Settings, on_read: Callable[[int], None]) -> str:
        assert stepped.wait(60)
        on_read(7)
        time.sleep(3 * hashing.POLL)
        return "ab" * 32

    monkeypatch.setattr(hashes, "sha256", slow)
    on_hash = lambda what, done, total: reports.append((what, done, total))  # noqa: E731
    picture = next(model.paint("a cat", on_step=lambda _: stepped.set(), on_hash=on_hash, **OPTIONS))

    assert picture.recipe["model"]["sha256"] == model.sha256 == "ab" * 32
    assert "Model hash: ababababab" in picture.parameters
    assert reports[-1] == ("hashing the model", 7, model.file.path.stat().st_size)


def test_a_model_file_that_cannot_be_hashed_costs_no_picture(
    narrow: Narrows, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    model = gouache.load(narrow("sd1").file, settings=settings)

    def fail(file: ModelFile, *_: object) -> str:
        raise FileError(file.path, "cannot be read")

    monkeypatch.setattr(hashes, "sha256", fail)

    assert next(model.paint("a cat", **OPTIONS)).recipe["model"]["sha256"] is None
    with pytest.raises(FileError, match="cannot be read"):
        _ = model.sha256


def test_painting_leaves_autograd_as_it_was(loaded: Models):
    pictures = loaded("sd1").paint("a cat", count=2, **OPTIONS)

    next(pictures)

    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_guidance_works_on_the_denoise_method(loaded: Models):
    model = loaded("sd1")
    positive, negative = model.encode_prompts(["a cat"]), model.encode_prompts(["dog"], negative=True)
    x, sigma = normal(1, 4, 8, 8), torch.tensor(2.0)

    guided = guidance.cfg(model.denoise, positive, negative, 3.0)(x, sigma)

    conditional, unconditional = (model.denoise(x, sigma, each) for each in (positive, negative))
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_encode_and_decode_agree_with_diffusers(family: str, narrow: Narrows, loaded: Models):
    vae, model = narrow(family).pipeline.vae, loaded(family)
    images, latents = normal(2, 3, 64, 96).clamp(-1, 1), normal(2, 4, 8, 12)

    with torch.inference_mode():
        encoded = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
        decoded = vae.decode(latents / vae.config.scaling_factor).sample

    torch.testing.assert_close(model.encode(images), encoded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.decode(latents), decoded, rtol=1e-4, atol=1e-4)


def test_changing_a_network_changes_the_picture_and_not_the_file(narrow: Narrows, settings: Settings):
    model = gouache.load(narrow("sd1").file, settings=settings)
    before = next(model.paint("a cat", **OPTIONS)).latent

    with torch.inference_mode():
        model.unet.get_parameter("out.2.bias").add_(0.5)

    assert (next(model.paint("a cat", **OPTIONS)).latent - before).abs().mean() > 0.1
    again = gouache.load(narrow("sd1").file, settings=settings)
    assert torch.equal(next(again.paint("a cat", **OPTIONS)).latent, before)

"""The pictures of a request: init, mask and depth, given as values, and what the model receives of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gouache import Model, Picture
from gouache.diffusion.conditioning import Conditioning
from gouache.errors import RequestError
from gouache.generate.request import Request
from gouache.generate.source import read_source

Models = Callable[[str], Model]


def paint(model: Model, **options: Any) -> Picture:
    return next(model.paint("a cat", **{"steps": 4, "seed": 5, "cfg": 1} | options))


def halves(path: Path, size: tuple[int, int], left: str = "red", right: str = "blue") -> Path:
    """A picture whose left and right halves have these colours, written to `path`."""
    picture = Image.new("RGB", size, right)
    picture.paste(left, (0, 0, size[0] // 2, size[1]))
    picture.save(path)
    return path


def encoded(model: Model, picture: Image.Image) -> Tensor:
    levels = torch.from_numpy(np.array(picture.convert("RGB"))).float()
    return model.encode((levels / 127.5 - 1).permute(2, 0, 1)[None])


def test_the_size_follows_the_picture_down_to_multiples_of_eight(loaded: Models, tmp_path: Path):
    init = halves(tmp_path / "init.png", (87, 71))

    assert paint(loaded("sd1"), init=init).image.size == (80, 64)
    assert paint(loaded("sd1"), init=init, size=(64, 72)).image.size == (64, 72)


def test_a_picture_too_narrow_for_any_size_is_refused(loaded: Models):
    line = Image.new("RGB", (4_000_000, 1))

    with pytest.raises(RequestError, match="init: is 4000000x1, too narrow to start from"):
        paint(loaded("sd1"), init=line)


def test_a_picture_of_another_shape_is_scaled_to_cover_and_cropped_in_the_middle(loaded: Models, tmp_path: Path):
    init = halves(tmp_path / "init.png", (256, 64))  # 64x64 keeps the middle, where red meets blue

    source = read_source(loaded("sd1"), Request(init=init), (64, 64))  # type: ignore[arg-type]

    expected = encoded(loaded("sd1"), Image.open(halves(tmp_path / "middle.png", (64, 64))))
    torch.testing.assert_close(source.latent, expected, rtol=0, atol=1e-4)


def test_a_base_model_keeps_the_picture_outside_the_mask(loaded: Models, tmp_path: Path):
    model = loaded("sd1")
    init = halves(tmp_path / "init.png", (64, 64))
    mask = halves(tmp_path / "mask.png", (64, 64), left="black", right="white")

    for sampler in ("Euler", "Euler a", "DPM++ 2M SDE", "DDIM", "UniPC"):
        for strength in (0.5, 1.0):
            picture = paint(model, init=init, mask=mask, sampler=sampler, strength=strength)

            original = encoded(model, Image.open(init))[0]
            torch.testing.assert_close(picture.latent[:, :, :4], original[:, :, :4], rtol=0, atol=1e-3)
            assert (picture.latent[:, :, 4:] - original[:, :, 4:]).abs().mean() > 0.1


def test_less_strength_keeps_more_of_the_picture(loaded: Models, tmp_path: Path):
    model = loaded("sd1")
    init = halves(tmp_path / "init.png", (64, 64))

    latents = [paint(model, init=init, strength=strength, steps=10).latent for strength in (0.1, 0.5, 0.9)]

    distances = [float((each - encoded(model, Image.open(init))).abs().mean()) for each in latents]
    assert distances == sorted(distances) and distances[0] < distances[2] / 4


def concat_channels(model: Model, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    """The extra input channels that the U-Net receives, (1, E, h, w)."""
    received: list[Tensor | None] = []
    denoise = model.denoise

    def watched(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        received.append(conditioning.concat)
        return denoise(x, sigma, conditioning)

    with monkeypatch.context() as patch:
        patch.setattr(model, "denoise", watched)
        paint(model, steps=1, **options)
    assert received[0] is not None
    return received[0]


def test_an_inpainting_model_without_a_picture_receives_a_grey_one_fully_masked(
    loaded: Models, monkeypatch: pytest.MonkeyPatch
):
    model = loaded("sd1-inpainting")

    channels = concat_channels(model, monkeypatch, size=(64, 64))

    grey = model.encode(torch.zeros(1, 3, 64, 64))
    assert torch.equal(channels, torch.cat([torch.ones(1, 1, 8, 8), grey], dim=1))


def test_an_instruct_pix2pix_model_requires_a_picture(loaded: Models):
    with pytest.raises(RequestError, match="init: is missing: this model changes a picture by instruction"):
        paint(loaded("sd1-edit"), size=(64, 64))


def test_a_depth_model_receives_the_depth_scaled_to_minus_one_to_one(
    loaded: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = loaded("sd2-depth")
    depth = halves(tmp_path / "depth.png", (64, 64), left="#404040", right="#c0c0c0")

    channels = concat_channels(model, monkeypatch, depth=depth, size=(64, 64))

    assert channels.shape == (1, 1, 8, 8)
    expected = torch.tensor([-1.0] * 4 + [1.0] * 4).expand(1, 1, 8, 8)
    torch.testing.assert_close(channels, expected, rtol=0, atol=0.2)  # resampling rounds, and overshoots at the edge
    with pytest.raises(RequestError, match="depth: is missing"):
        paint(model, size=(64, 64))


@pytest.mark.parametrize("setting", ["init", "mask"])
def test_a_file_that_is_not_a_picture_is_refused_with_the_name_of_its_setting(
    setting: str, loaded: Models, tmp_path: Path
):
    good = halves(tmp_path / "good.png", (64, 64))
    (tmp_path / "text.png").write_text("<html>")
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "script.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    reasons = {
        "absent.png": "there is no file",
        "": "is a folder",
        "text.png": "is not a picture that can be read",
        "half.png": "is not a picture that can be read",
        "script.eps": "is not a picture that can be read",
        "bomb.png": "has 9000x9000 pixels; at most 64 million",
    }

    for name, reason in reasons.items():
        options = {"init": good} | {setting: tmp_path / name}
        with pytest.raises(RequestError) as caught:
            paint(loaded("sd1"), **options)
        assert caught.value.setting == setting
        assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_the_recipe_has_the_hash_of_every_picture_file(loaded: Models, tmp_path: Path):
    init = halves(tmp_path / "init.png", (64, 64))
    mask = halves(tmp_path / "mask.png", (64, 64), left="black", right="white")

    recipe = paint(loaded("sd1"), init=init, mask=mask).recipe

    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in (("init", init), ("mask", mask))}
    assert recipe["inputs"] == hashes


def test_a_strength_that_leaves_no_steps_is_refused(loaded: Models, tmp_path: Path):
    with pytest.raises(
        RequestError, match=r"strength: 0\.1 leaves no steps to run \(0 of 4\); raise strength or steps"
    ):
        paint(loaded("sd1"), init=halves(tmp_path / "init.png", (64, 64)), strength=0.1)


@pytest.mark.parametrize(
    ("steps", "strength", "count"), [(50, 0.58, 29), (100, 0.29, 29), (25, 0.6, 15), (10, 0.55, 5), (3, 1.0, 3)]
)
def test_the_steps_that_run_are_steps_times_strength_rounded_down(
    steps: int, strength: float, count: int, loaded: Models, tmp_path: Path
):
    """50 x 0.58 is 28.999999999999996 in float64, and 100 x 0.29 is 28.999999999999996 too: both mean 29."""
    model, passed = loaded("sd1"), list[tuple[int, int]]()
    request = Request(
        init=halves(tmp_path / "init.png", (64, 64)), steps=steps, strength=strength, sampler="Euler", cfg=1
    )  # type: ignore[arg-type]

    next(model.paint(request, on_step=lambda step: passed.append((step.index, step.count))))

    assert passed == [(index, count) for index in range(count)]


def test_a_picture_gives_the_same_latents_however_it_is_given(loaded: Models, tmp_path: Path):
    """Path, text, bytes of the file, PIL image, array of integers, array of floats."""
    path = tmp_path / "init.png"
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    image = Image.open(path).convert("RGB")
    array = np.array(image)
    given: list[Any] = [path, str(path), path.read_bytes(), image, array, array / 255]

    latents = [paint(loaded("sd1"), init=each, strength=0.5, steps=2).latent for each in given]

    assert all(torch.equal(each, latents[0]) for each in latents[1:])


def test_a_mask_gives_the_same_latents_however_it_is_given(loaded: Models, tmp_path: Path):
    """As a file, a grey PIL image, an array of integers and one of booleans."""
    init = halves(tmp_path / "init.png", (64, 64))
    mask = halves(tmp_path / "mask.png", (64, 64), left="black", right="white")
    grey = Image.open(mask).convert("L")
    given: list[Any] = [mask, grey, np.array(grey), np.array(grey) > 0]

    latents = [paint(loaded("sd1"), init=init, mask=each, steps=2).latent for each in given]

    assert all(torch.equal(each, latents[0]) for each in latents[1:])


def test_a_picture_that_was_not_a_file_has_a_hash_of_its_pixels_in_the_recipe(loaded: Models):
    image = Image.effect_noise((64, 64), 80)

    recipe = paint(loaded("sd1"), init=image, steps=2).recipe

    assert re.fullmatch("[0-9a-f]{64}", recipe["inputs"]["init"]) and recipe["request"]["init"] is None


def test_a_missing_picture_is_refused_before_anything_is_painted(loaded: Models):
    with pytest.raises(RequestError, match=r"init: there is no file .*absent\.png"):
        loaded("sd1").paint("a cat", init="absent.png")  # not even iterated


def test_eta_is_refused_for_a_sampler_without_it(loaded: Models):
    with pytest.raises(RequestError, match=r"eta: DPM\+\+ 2M has no eta"):
        paint(loaded("sd1"), sampler="DPM++ 2M", eta=0.5, size=(64, 64))

"""Pictures, masks and depth that a painting starts from."""

from __future__ import annotations

import hashlib
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


def paint(model: Model, **knobs: Any) -> Picture:
    return next(model.paint("a cat", **{"steps": 4, "seed": 5, "cfg": 1} | knobs))


def drawn(path: Path, size: tuple[int, int], left: str = "red", right: str = "blue", **options: Any) -> Path:
    """A picture of two halves."""
    picture = Image.new("RGB", size, right)
    picture.paste(left, (0, 0, size[0] // 2, size[1]))
    picture.save(path, **options)
    return path


def latent(model: Model, picture: Image.Image) -> Tensor:
    levels = torch.from_numpy(np.array(picture.convert("RGB"))).float()
    return model.encode((levels / 127.5 - 1).permute(2, 0, 1)[None])


def test_the_size_follows_the_picture_down_to_multiples_of_eight(loaded: Models, tmp_path: Path):
    init = drawn(tmp_path / "init.png", (87, 71))

    assert paint(loaded("sd1"), init=init).image.size == (80, 64)
    assert paint(loaded("sd1"), init=init, size=(64, 72)).image.size == (64, 72)


def test_a_picture_of_another_shape_is_scaled_to_cover_and_cut_evenly(loaded: Models, tmp_path: Path):
    init = drawn(tmp_path / "init.png", (256, 64))  # of which 64x64 keeps the middle, where red meets blue

    source = read_source(loaded("sd1"), Request(init=init, size=(64, 64)))

    expected = latent(loaded("sd1"), Image.open(drawn(tmp_path / "middle.png", (64, 64))))
    torch.testing.assert_close(source.latent, expected, rtol=0, atol=1e-4)


def test_outside_its_mask_an_ordinary_model_keeps_the_picture(loaded: Models, tmp_path: Path):
    model = loaded("sd1")
    init = drawn(tmp_path / "init.png", (64, 64))
    mask = drawn(tmp_path / "mask.png", (64, 64), left="black", right="white")

    for sampler in ("Euler", "Euler a", "DPM++ 2M SDE", "DDIM", "UniPC"):
        for strength in (0.5, 1.0):
            picture = paint(model, init=init, mask=mask, sampler=sampler, strength=strength)

            kept = latent(model, Image.open(init))[0]
            torch.testing.assert_close(picture.latent[:, :, :4], kept[:, :, :4], rtol=0, atol=1e-3)
            assert (picture.latent[:, :, 4:] - kept[:, :, 4:]).abs().mean() > 0.1


def test_less_strength_keeps_more_of_the_picture(loaded: Models, tmp_path: Path):
    model = loaded("sd1")
    init = drawn(tmp_path / "init.png", (64, 64))

    away = [
        float(
            (paint(model, init=init, strength=strength, steps=10).latent - latent(model, Image.open(init))).abs().mean()
        )
        for strength in (0.1, 0.5, 0.9)
    ]

    assert away == sorted(away) and away[0] < away[2] / 4


def told(model: Model, monkeypatch: pytest.MonkeyPatch, **knobs: Any) -> Tensor:
    """The extra channels that the U-Net is shown."""
    seen: list[Tensor | None] = []
    denoise = model.denoise

    def watched(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        seen.append(conditioning.concat)
        return denoise(x, sigma, conditioning)

    with monkeypatch.context() as patch:
        patch.setattr(model, "denoise", watched)
        paint(model, steps=1, **knobs)
    assert seen[0] is not None
    return seen[0]


def test_an_inpainting_model_without_a_picture_paints_all_of_a_grey_one(
    loaded: Models, monkeypatch: pytest.MonkeyPatch
):
    model = loaded("sd1-inpainting")

    channels = told(model, monkeypatch, size=(64, 64))

    grey = model.encode(torch.zeros(1, 3, 64, 64))
    assert torch.equal(channels, torch.cat([torch.ones(1, 1, 8, 8), grey], dim=1))


def test_an_edit_model_asks_for_its_picture(loaded: Models):
    with pytest.raises(RequestError, match="init: is missing: this model changes a picture by instruction"):
        paint(loaded("sd1-edit"), size=(64, 64))


def test_a_depth_model_is_shown_the_depth_from_far_to_near(
    loaded: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = loaded("sd2-depth")
    depth = drawn(tmp_path / "depth.png", (64, 64), left="#404040", right="#c0c0c0")

    channels = told(model, monkeypatch, depth=depth, size=(64, 64))

    assert channels.shape == (1, 1, 8, 8)
    expected = torch.tensor([-1.0] * 4 + [1.0] * 4).expand(1, 1, 8, 8)
    torch.testing.assert_close(channels, expected, rtol=0, atol=0.2)  # scaling rounds and overshoots at the edge
    with pytest.raises(RequestError, match="depth: is missing"):
        paint(model, size=(64, 64))


@pytest.mark.parametrize("setting", ["init", "mask"])
def test_what_is_no_picture_is_refused_by_the_name_of_its_setting(setting: str, loaded: Models, tmp_path: Path):
    good = drawn(tmp_path / "good.png", (64, 64))
    (tmp_path / "text.png").write_text("<html>")
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "script.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    wrong = {
        "absent.png": "there is no file",
        "": "is a folder",
        "text.png": "is not a picture that can be read",
        "half.png": "is not a picture that can be read",
        "script.eps": "is not a picture that can be read",
        "bomb.png": "has 9000x9000 pixels; at most 64 million",
    }

    for name, reason in wrong.items():
        knobs = {"init": good} | {setting: tmp_path / name}
        with pytest.raises(RequestError) as caught:
            paint(loaded("sd1"), **knobs)
        assert caught.value.setting == setting
        assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_the_recipe_has_the_hash_of_every_file_that_was_read(loaded: Models, tmp_path: Path):
    init = drawn(tmp_path / "init.png", (64, 64))
    mask = drawn(tmp_path / "mask.png", (64, 64), left="black", right="white")

    recipe = paint(loaded("sd1"), init=init, mask=mask).recipe

    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in (("init", init), ("mask", mask))}
    assert recipe["inputs"] == hashes


def test_a_strength_that_leaves_no_step_is_refused(loaded: Models, tmp_path: Path):
    with pytest.raises(RequestError, match=r"strength: 0\.1 of 4 steps is no step; raise either"):
        paint(loaded("sd1"), init=drawn(tmp_path / "init.png", (64, 64)), strength=0.1)


def test_eta_is_refused_for_a_sampler_that_has_none(loaded: Models):
    with pytest.raises(RequestError, match=r"eta: DPM\+\+ 2M adds no noise"):
        paint(loaded("sd1"), sampler="DPM++ 2M", eta=0.5, size=(64, 64))

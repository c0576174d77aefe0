"""Upscaling for hires fix, compared with independent calls of torch and Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gouache.errors import RequestError
from gouache.images.upscale import LATENT_MODES, upscale_latent, upscale_picture


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


# A1111, modules/shared.py `latent_upscale_modes`: "Latent", "Latent (bicubic)", "Latent (nearest-exact)".
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("latent", {"mode": "bilinear", "antialias": False, "align_corners": False}),
        ("bicubic", {"mode": "bicubic", "antialias": False, "align_corners": False}),
        ("nearest-exact", {"mode": "nearest-exact"}),
    ],
)
def test_latents_are_scaled_with_the_parameters_of_a1111(mode, options):
    x = latents(2, 4, 5, 7)

    found = upscale_latent(x, (11, 10), mode)

    assert found.shape == (2, 4, 10, 11)
    assert torch.equal(found, F.interpolate(x, size=(10, 11), **options))


@pytest.mark.parametrize("mode", LATENT_MODES)
def test_the_same_size_changes_nothing_and_a_constant_stays_constant(mode):
    x = latents(1, 4, 6, 8)

    torch.testing.assert_close(upscale_latent(x, (8, 6), mode), x)
    torch.testing.assert_close(
        upscale_latent(torch.full((1, 4, 3, 4), 0.7), (8, 6), mode), torch.full((1, 4, 6, 8), 0.7)
    )


def test_nearest_exact_at_twice_the_size_repeats_every_cell():
    x = latents(1, 4, 3, 5)

    assert torch.equal(upscale_latent(x, (10, 6), "nearest-exact"), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_bilinear_weights_at_twice_the_size_are_a_quarter_and_three_quarters():
    x = torch.tensor([[[[0.0, 4.0]]]])

    assert upscale_latent(x, (4, 1), "latent").flatten().tolist() == [0.0, 1.0, 3.0, 4.0]


def test_an_unknown_mode_is_a_one_line_error():
    with pytest.raises(RequestError, match=r"^hires_upscaler: 'lanczos' does not work on latents; expected latent, "):
        upscale_latent(latents(1, 4, 2, 2), (4, 4), "lanczos")


def test_pictures_are_scaled_by_lanczos():
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)

    found = upscale_picture(picture, (24, 20))

    assert found.size == (24, 20)
    assert np.array_equal(np.asarray(found), np.asarray(picture.resize((24, 20), Image.Resampling.LANCZOS)))
    assert np.array_equal(np.asarray(upscale_picture(picture, picture.size)), noise)
    flat = upscale_picture(Image.new("RGB", (6, 4), (10, 200, 77)), (15, 9))
    assert flat.getcolors() == [(15 * 9, (10, 200, 77))]

"""The autoencoder's losses and their terms, compared with closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gouache.training.autoencoder import Pictures, edge_difference, psnr, pyramid, ssim
from gouache.training.objective import step_generator

from .toys import pictures, small_autoencoder


def picture(seed: int, *, size: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("measure", [pyramid, edge_difference])
def test_a_difference_is_zero_for_equal_images_symmetric_and_proportional(measure):
    a, b = picture(1), picture(2)

    assert float(measure(a, a)) == 0
    assert_close(measure(a, b), measure(b, a))
    assert_close(measure(a + 3 * (b - a), a), 3 * measure(b, a))


def test_a_colour_shift_counts_equally_at_each_of_four_scales_and_has_no_edge_difference():
    a = picture(1)

    assert_close(pyramid(a + 0.1, a), torch.tensor(0.4), rtol=1e-4, atol=0)
    assert_close(edge_difference(a + 0.1, a), torch.tensor(0.0), rtol=0, atol=1e-6)


def test_a_checkerboard_counts_at_the_finest_scale_only_and_twice_at_every_edge():
    a = picture(1)
    board = torch.ones(16, 16)
    board[::2, ::2] = board[1::2, 1::2] = -1

    assert_close(pyramid(a + 0.1 * board, a), torch.tensor(0.1), rtol=1e-4, atol=0)
    assert_close(edge_difference(a + 0.1 * board, a), torch.tensor(0.4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("error", [0.01, 0.1, 0.5])
def test_the_psnr_of_a_constant_error_is_its_closed_form(error):
    b = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.9

    found = psnr(b + error, b)

    assert_close(found, torch.full((3,), 20 * math.log10(2 / error)), rtol=1e-4, atol=0)


def test_the_psnr_ignores_values_outside_the_range_of_an_image():
    b = torch.ones(1, 3, 4, 4)

    assert float(psnr(b * 5, b)) == pytest.approx(100)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    objective = small_autoencoder()
    batch = pictures(0)

    losses = objective.losses(batch, step=3)

    moments = objective.vae.encode(batch.images)
    noise = torch.randn(moments.mean.shape, generator=step_generator(objective.seed, 3))
    decoded = objective.vae.decode(moments.mean + (moments.logvar / 2).exp() * noise)
    assert_close(losses["scales"], pyramid(decoded, batch.images))
    assert_close(losses["kl"], moments.kl().mean())
    assert_close(losses["structure"], 1 - ssim(decoded, batch.images).mean())
    assert_close(losses["loss"], losses["scales"] + losses["edges"] + 0.1 * losses["structure"] + 1e-6 * losses["kl"])


def test_ssim_of_each_window_is_that_of_wang_et_al():
    a, b = picture(3, size=12), picture(4, size=12)
    b = 0.7 * a + 0.3 * b

    found = ssim(a, b)

    assert found.shape == (2, 3, 6, 6)
    x, y = (image[1, 2, 3:10, 4:11].double().numpy().ravel() for image in (a, b))
    c1, c2 = 0.02**2, 0.06**2
    (xx, xy), (_, yy) = np.cov(x, y)
    luminance = (2 * x.mean() * y.mean() + c1) / (x.mean() ** 2 + y.mean() ** 2 + c1)
    assert float(found[1, 2, 3, 4]) == pytest.approx(luminance * (2 * xy + c2) / (xx + yy + c2), abs=1e-5)
    assert_close(ssim(a, a), torch.ones_like(found))


def test_with_given_latents_only_the_decoder_gets_gradients():
    objective = small_autoencoder()
    batch = pictures(0)
    latents = objective.vae.encode(batch.images).mean.detach()

    losses = objective.losses(Pictures(batch.images, latents), step=0)
    losses["loss"].backward()

    assert float(losses["kl"]) == 0
    trained = {name.split(".")[0] for name, p in objective.vae.named_parameters() if p.grad is not None}
    assert trained == {"decoder", "post_quant_conv"}

"""The autoencoder's losses: what they forgive, what they do not, and the closed forms of the measures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gouache.training.autoencoder import Pictures, edge_difference, psnr, pyramid, similarity
from gouache.training.objective import chance

from .toys import pictures, small_autoencoder


def picture(seed: int, *, size: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("measure", [pyramid, edge_difference])
def test_a_difference_is_nought_for_equals_symmetric_and_grows_in_proportion(measure):
    a, b = picture(1), picture(2)

    assert float(measure(a, a)) == 0
    assert_close(measure(a, b), measure(b, a))
    assert_close(measure(a + 3 * (b - a), a), 3 * measure(b, a))


def test_a_shift_of_colour_costs_the_same_at_each_of_four_scales_and_no_edges():
    a = picture(1)

    assert_close(pyramid(a + 0.1, a), torch.tensor(0.4), rtol=1e-4, atol=0)
    assert_close(edge_difference(a + 0.1, a), torch.tensor(0.0), rtol=0, atol=1e-6)


def test_a_checkerboard_costs_the_finest_scale_alone_and_every_edge_twice():
    a = picture(1)
    board = torch.ones(16, 16)
    board[::2, ::2] = board[1::2, 1::2] = -1

    assert_close(pyramid(a + 0.1 * board, a), torch.tensor(0.1), rtol=1e-4, atol=0)
    assert_close(edge_difference(a + 0.1 * board, a), torch.tensor(0.4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("error", [0.01, 0.1, 0.5])
def test_the_psnr_of_a_constant_error_is_twenty_times_the_logarithm_of_the_range_over_it(error):
    b = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.9

    found = psnr(b + error, b)

    assert_close(found, torch.full((3,), 20 * math.log10(2 / error)), rtol=1e-4, atol=0)


def test_the_psnr_does_not_count_what_no_picture_can_show():
    b = torch.ones(1, 3, 4, 4)

    assert float(psnr(b * 5, b)) == pytest.approx(100)


def test_the_loss_is_its_parts_and_the_weighted_divergence():
    objective = small_autoencoder()
    batch = pictures(0)

    losses = objective.losses(batch, step=3)

    moments = objective.vae.encode(batch.images)
    noise = torch.randn(moments.mean.shape, generator=chance(objective.seed, 3))
    back = objective.vae.decode(moments.mean + (moments.logvar / 2).exp() * noise)
    assert_close(losses["scales"], pyramid(back, batch.images))
    assert_close(losses["kl"], moments.kl().mean())
    assert_close(losses["structure"], 1 - similarity(back, batch.images).mean())
    assert_close(losses["loss"], losses["scales"] + losses["edges"] + 0.1 * losses["structure"] + 1e-6 * losses["kl"])


def test_similarity_is_that_of_wang_et_al_window_by_window():
    a, b = picture(3, size=12), picture(4, size=12)
    b = 0.7 * a + 0.3 * b

    found = similarity(a, b)

    assert found.shape == (2, 3, 6, 6)
    x, y = (image[1, 2, 3:10, 4:11].double().numpy().ravel() for image in (a, b))
    calm_means, calm_spreads = 0.02**2, 0.06**2
    (xx, xy), (_, yy) = np.cov(x, y)
    bright = (2 * x.mean() * y.mean() + calm_means) / (x.mean() ** 2 + y.mean() ** 2 + calm_means)
    assert float(found[1, 2, 3, 4]) == pytest.approx(
        bright * (2 * xy + calm_spreads) / (xx + yy + calm_spreads), abs=1e-5
    )
    assert_close(similarity(a, a), torch.ones_like(found))


def test_given_latents_only_the_decoder_gets_gradients():
    objective = small_autoencoder()
    batch = pictures(0)
    latents = objective.vae.encode(batch.images).mean.detach()

    losses = objective.losses(Pictures(batch.images, latents), step=0)
    losses["loss"].backward()

    assert float(losses["kl"]) == 0
    learnt = {name.split(".")[0] for name, p in objective.vae.named_parameters() if p.grad is not None}
    assert learnt == {"decoder", "post_quant_conv"}

"""Weights by noise level, distances, masks: each compared with its formula as published or in kohya's scripts."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from gouache.diffusion.denoiser import target
from gouache.diffusion.schedule import Schedule
from gouache.training.weighting import distance, huber_threshold, level_weights, masked_mean, v_like

SCHEDULE = Schedule.scaled_linear()
T = torch.tensor([0, 5, 50, 300, 600, 900, 999])


def theirs():
    """(alphas_cumprod, SNR) at T, of diffusers' scheduler."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return scheduler.alphas_cumprod[T], compute_snr(scheduler, T)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_each_weighting_is_its_formula_with_diffusers_snr(prediction):
    _, snr = theirs()
    capped = snr.clamp(max=1000)  # kohya's scripts limit the SNR where they divide by it
    eps = prediction == "eps"
    expected = {
        "none": torch.ones(7),
        "min-snr": snr.clamp(max=5.0) / (snr if eps else snr + 1),
        "velocity": (snr + 1).clamp(max=6.0) / (snr if eps else snr + 1),
        "noise": torch.ones(7) if eps else capped / (capped + 1),
        "debiased": capped**-0.5 if eps else 1 / (capped + 1),
    }

    for name, weights in expected.items():
        found = level_weights(name, 5.0, prediction, SCHEDULE.snr(T))
        assert_close(found, weights, rtol=2e-3, atol=1e-6, msg=name)


def test_with_the_noise_weighting_an_error_of_v_counts_as_the_error_of_the_noise_it_implies():
    generator = torch.Generator().manual_seed(0)
    x0, noise, v = (torch.randn(7, 4, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    alpha = theirs()[0].double()[:, None, None, None]
    noisy = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
    implied = (1 - alpha).sqrt() * noisy + alpha.sqrt() * v
    wanted = target("v", x0, noise, SCHEDULE.sigma(T))

    weights = level_weights("noise", 5.0, "v", SCHEDULE.snr(T)).double()

    error = weights * (v - wanted).pow(2).mean((1, 2, 3))
    assert_close(error, (implied - noise).pow(2).mean((1, 2, 3)), rtol=1e-3, atol=1e-6)


def test_v_like_loss_adds_a_share_of_the_loss_divided_by_kohyas_scale():
    _, snr = theirs()
    scale = snr.clamp(max=1000) / (snr.clamp(max=1000) + 1)

    assert_close(v_like(0.3, SCHEDULE.snr(T)), 1 + 0.3 / scale, rtol=1e-3, atol=0)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", ["none", "min-snr", "debiased", "velocity", "noise"])
def test_weights_are_finite_and_moderate_at_zero_terminal_snr(name, prediction):
    schedule = SCHEDULE.zero_terminal_snr()
    snr = schedule.snr(torch.arange(1000))

    weights = level_weights(name, 5.0, prediction, snr) * v_like(1.0, snr)

    assert bool(torch.isfinite(weights).all()) and float(level_weights(name, 5.0, prediction, snr).max()) < 1500


def test_huber_thresholds_are_those_of_kohyas_scripts():
    alphas, _ = theirs()
    sigma = ((1 - alphas) / alphas).sqrt()
    threshold = lambda kind, c=0.1, scale=2.0: huber_threshold(kind, c, scale, SCHEDULE, T)  # noqa: E731

    assert_close(threshold("snr"), (1 - 0.1) / (1 + sigma) ** 2 + 0.1, rtol=1e-3, atol=0)
    assert_close(threshold("exponential"), torch.exp(math.log(0.1) / 1000 * T) * 2.0)
    assert_close(threshold("constant"), torch.full((7,), 0.2))


def test_distances_are_those_of_torch_or_their_limits():
    d = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    c = torch.tensor([0.01, 0.1, 0.5, 1.0, 3.0])
    zero = torch.zeros_like(d)
    root = (d**2 + c[:, None, None, None] ** 2).sqrt() - c[:, None, None, None]

    assert_close(distance("l2", d, c), torch.nn.functional.mse_loss(d, zero, reduction="none"))
    assert_close(distance("l1", d, c), torch.nn.functional.l1_loss(d, zero, reduction="none"))
    assert_close(distance("huber", d, c), 2 * c[:, None, None, None] * root)
    assert_close(distance("smooth-l1", d, c), 2 * root)
    small, large = torch.full((1, 1, 1, 1), 1e-3), torch.full((1, 1, 1, 1), 1e3)
    one = torch.ones(1)
    assert_close(distance("huber", small, one), small**2, rtol=1e-1, atol=0)  # float32 near 0
    assert_close(distance("smooth-l1", large, one * 1e-3), 2 * large, rtol=1e-4, atol=0)


def test_a_masked_mean_is_that_of_the_numbers_within_the_mask_whatever_its_size():
    values = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(3, 1, 8, 8)
    mask[0, :, :2, :3] = 1
    mask[1] = 1

    found = masked_mean(values, mask)

    assert_close(found[0], values[0, :, :2, :3].mean())
    assert_close(found[1], values[1].mean())
    assert float(found[2]) == 0
    assert_close(masked_mean(values, None), values.mean((1, 2, 3)))


def test_soft_masks_and_the_weight_outside_are_weights():
    values = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    mask = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    weights = (mask + (1 - mask) * 0.2).expand_as(values)

    assert_close(masked_mean(values, mask, 0.2), ((values * weights).sum() / weights.sum())[None])
    assert_close(masked_mean(values, torch.zeros(1, 1, 4, 4), 1.0), values.mean()[None])

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from gouache.diffusion.schedule import Schedule
from gouache.errors import RequestError

from .recorded import recorded


def test_scaled_linear_equals_the_schedule_of_stable_diffusion():
    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod

    ours = Schedule.scaled_linear()

    torch.testing.assert_close(ours.alphas_cumprod, theirs, rtol=2e-5, atol=0)
    assert (ours.sigma_min, ours.sigma_max) == pytest.approx((0.0292, 14.6146), abs=1e-4)


def test_linear_equals_the_schedule_of_ddpm():
    theirs = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").alphas_cumprod

    torch.testing.assert_close(Schedule.linear().alphas_cumprod, theirs, rtol=2e-5, atol=0)


def test_zero_terminal_snr_follows_lin_et_al_with_a_finite_last_level():
    theirs = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    ).alphas_cumprod

    ours = Schedule.scaled_linear().zero_terminal_snr()

    torch.testing.assert_close(ours.alphas_cumprod[:-1], theirs[:-1], rtol=1e-3, atol=1e-8)
    assert theirs[-1] == 0
    assert ours.sigma_max == pytest.approx(math.sqrt(1 / 4.8973451890853435e-08 - 1))
    assert ours.sigma_min == pytest.approx(Schedule.scaled_linear().sigma_min)


def test_sigma_and_t_equal_those_of_k_diffusion():
    schedule, theirs = Schedule.scaled_linear(), recorded("schedule")

    sigmas, times = schedule.sigma(theirs["times"]), schedule.t(theirs["levels"])

    torch.testing.assert_close(sigmas, theirs["sigma of times"], rtol=3e-6, atol=0)
    torch.testing.assert_close(times, theirs["t of levels"], rtol=0, atol=2e-3)
    assert torch.equal(schedule.t(theirs["levels"], quantize=True).long(), theirs["nearest t of levels"])


@pytest.mark.parametrize("schedule", [Schedule.scaled_linear(), Schedule.scaled_linear().zero_terminal_snr()])
def test_trained_levels_map_to_integer_timesteps_and_back_exactly(schedule: Schedule):
    timesteps = torch.arange(1000.0)

    assert torch.equal(schedule.t(schedule.sigmas), timesteps)
    assert torch.equal(schedule.sigma(timesteps), schedule.sigmas)
    assert all(float(schedule.t(schedule.sigmas[index])) == index for index in (0, 1, 500, 951, 999))


def test_fractional_timesteps_round_trip():
    schedule = Schedule.scaled_linear()
    times = torch.linspace(0, 999, 3001)

    torch.testing.assert_close(schedule.t(schedule.sigma(times)), times, rtol=0, atol=1e-3)


def test_results_have_the_shape_of_the_argument():
    schedule = Schedule.scaled_linear()

    assert schedule.t(torch.tensor(3.0)).shape == ()
    assert schedule.t(torch.full((4,), 3.0)).shape == (4,)
    assert schedule.sigma(torch.full((2, 3), 5.5)).shape == (2, 3)


def test_the_timestep_of_a_continuous_model_is_a_quarter_of_the_logarithm():
    schedule = Schedule.edm(0.002, 700.0)

    assert float(schedule.t(torch.tensor(math.e))) == pytest.approx(0.25)
    assert float(schedule.sigma(0.25)) == pytest.approx(math.e)
    assert (schedule.sigma_min, schedule.sigma_max) == pytest.approx((0.002, 700.0))


def test_snr_is_signal_variance_over_noise_variance():
    schedule = Schedule.scaled_linear()
    alphas = schedule.alphas_cumprod[[0, 300, 999]]

    torch.testing.assert_close(
        schedule.snr(torch.tensor([0.0, 300.0, 999.0])), alphas / (1 - alphas), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 1.0], [2.0, 1.0], [[1.0, 2.0]]])
def test_levels_that_do_not_increase_are_refused(sigmas: list):
    with pytest.raises(RequestError, match="strictly increasing"):
        Schedule(torch.tensor(sigmas))

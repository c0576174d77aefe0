from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler

from gouache.diffusion.beta import beta_quantile
from gouache.diffusion.schedule import Schedule
from gouache.diffusion.spacing import SPACINGS, by_name, polyexponential
from gouache.errors import RequestError

from .recorded import recorded

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

SCHEDULE = Schedule.scaled_linear()
SCHEDULES = {"sd": SCHEDULE, "zero snr": SCHEDULE.zero_terminal_snr(), "edm": Schedule.edm()}
NAMES = [spacing.name for spacing in SPACINGS]


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("name", NAMES)
def test_levels_decrease_strictly_from_a_trained_level_to_zero(name, schedule_name):
    schedule = SCHEDULES[schedule_name]
    for steps in (1, 2, 3, 7, 20, 30, 50, 333, 501, 999, 1000):
        sigmas = by_name(name).function(schedule, steps)

        assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float32
        assert bool((sigmas.diff() < 0).all()) and sigmas[-1] == 0
        assert sigmas[0] <= schedule.sigma_max and sigmas[-2] >= schedule.sigma_min


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"DDIM"}))
def test_all_but_ddim_start_at_the_highest_level(name):
    for steps in (1, 2, 20):
        assert float(by_name(name).function(SCHEDULE, steps)[0]) == pytest.approx(SCHEDULE.sigma_max, rel=1e-6)


@pytest.mark.parametrize("name", ["Uniform", "Karras", "Exponential", "Polyexponential", "Beta"])
def test_spacings_that_include_the_lowest_level_include_it_exactly(name):
    for steps in (2, 3, 20, 50):
        assert float(by_name(name).function(SCHEDULE, steps)[-2]) == SCHEDULE.sigma_min


@pytest.mark.parametrize("name", ["karras", "exponential", "polyexponential"])
def test_levels_equal_those_of_k_diffusion_for_the_same_ends(name):
    theirs = recorded("spacing")[name]
    ends = Schedule(torch.tensor([0.0292, 14.6146]))

    torch.testing.assert_close(by_name(name).function(ends, 12), theirs, rtol=2e-6, atol=0)


def test_uniform_and_normal_equal_k_diffusions_levels_of_a_discrete_model():
    theirs = recorded("spacing")["uniform"]

    for name in ("Uniform", "Normal"):
        torch.testing.assert_close(by_name(name).function(SCHEDULE, 12), theirs, rtol=3e-6, atol=0)


def test_polyexponential_is_a_polynomial_in_the_logarithm():
    sigmas = polyexponential(SCHEDULE, 5, rho=2.0)

    logs = [math.log(SCHEDULE.sigma_min), math.log(SCHEDULE.sigma_max)]
    expected = [logs[0] + (logs[1] - logs[0]) * left**2 for left in (1, 0.75, 0.5, 0.25, 0)]
    torch.testing.assert_close(sigmas[:-1].log(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_sgm_uniform_replaces_the_last_level_by_zero():
    times = SCHEDULE.t(by_name("SGM Uniform").function(SCHEDULE, 9)[:-1])

    torch.testing.assert_close(times, torch.tensor([999.0 - 111 * step for step in range(9)]), rtol=0, atol=1e-3)


def test_sgm_uniform_equals_the_linspace_spacing_of_diffusers_up_to_rounding():
    theirs = UniPCMultistepScheduler(timestep_spacing="linspace")
    theirs.set_timesteps(20)

    times = SCHEDULE.t(by_name("SGM Uniform").function(SCHEDULE, 20)[:-1])

    assert times.round().long().tolist() == theirs.timesteps.tolist()


def test_simple_counts_trained_levels_down_from_the_last():
    times = SCHEDULE.t(by_name("Simple").function(SCHEDULE, 3)[:-1])

    assert times.tolist() == [999, 999 - 333, 999 - 666]


@pytest.mark.parametrize("steps", [1, 2, 4, 20, 30, 50, 300])
def test_ddim_has_the_timesteps_of_diffusers_leading_spacing(steps):
    theirs = DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    theirs.set_timesteps(steps)

    times = SCHEDULE.t(by_name("DDIM").function(SCHEDULE, steps)[:-1])

    assert times.long().tolist() == theirs.timesteps.tolist()


def test_ddim_in_20_steps_is_951_901_and_so_on_to_1():
    times = SCHEDULE.t(by_name("DDIM").function(SCHEDULE, 20)[:-1])

    assert times.tolist() == list(range(951, 0, -50))


def test_ddim_starts_a_zero_terminal_snr_model_below_its_last_level():
    schedule = SCHEDULES["zero snr"]

    assert by_name("DDIM").function(schedule, 20)[0] == schedule.sigmas[951]


def test_beta_quantiles_equal_those_of_scipy():
    shares = torch.tensor([1 / 999, 0.01, 0.05, 0.1, 0.25, 0.75, 0.9, 0.99, 0.999], dtype=torch.float64)
    # scipy 1.17.1, stats.beta.ppf(share, 0.6, 0.6) and (share, 2.0, 0.7)
    symmetric = [
        1.8589710896477086e-05, 0.0008612388215429059, 0.012554456873611399, 0.03958440558878085,
        0.17568037865269498, 0.824319621347305, 0.9604155944112192, 0.9991387611784571, 0.9999814412614826,
    ]  # fmt: skip
    skewed = [
        0.040846617227669774, 0.127905734108236, 0.2808335048974636, 0.391217733584531, 0.5975511063318193,
        0.9326802631940563, 0.9823501404512671, 0.9993486553990043, 0.9999757294750512,
    ]  # fmt: skip

    for (a, b), expected in {(0.6, 0.6): symmetric, (2.0, 0.7): skewed}.items():
        np.testing.assert_allclose(beta_quantile(shares, a, b).numpy(), expected, rtol=1e-12)


def test_beta_quantiles_equal_closed_forms():
    shares = torch.linspace(0, 1, 101, dtype=torch.float64)

    np.testing.assert_allclose(beta_quantile(shares, 0.5, 0.5), np.sin(np.pi / 2 * shares.numpy()) ** 2, atol=1e-14)
    np.testing.assert_allclose(beta_quantile(shares, 1.0, 3.0), 1 - (1 - shares.numpy()) ** (1 / 3), atol=1e-14)
    np.testing.assert_allclose(beta_quantile(shares, 1.0, 1.0), shares, atol=1e-15)


def test_beta_places_levels_at_its_quantiles():
    sigmas = by_name("Beta").function(SCHEDULE, 5)

    quantiles = np.array([1, 0.8243196213, 0.5, 0.1756803787, 0])
    expected = SCHEDULE.sigma_min + quantiles * (SCHEDULE.sigma_max - SCHEDULE.sigma_min)
    np.testing.assert_allclose(sigmas[:-1].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["Simple", "DDIM"])
def test_more_steps_than_trained_levels_are_refused(name):
    with pytest.raises(RequestError, match="1001"):
        by_name(name).function(SCHEDULE, 1001)


@pytest.mark.parametrize(
    ("alias", "expected"),
    [
        ("karras", "Karras"),
        ("ka", "Karras"),
        ("sgm_uniform", "SGM Uniform"),
        ("SGMUniform", "SGM Uniform"),
        ("ddim_uniform", "DDIM"),
        ("normal", "Normal"),
        ("simple", "Simple"),
        ("beta", "Beta"),
        ("exponential", "Exponential"),
    ],
)
def test_names_of_a1111_and_comfyui_are_recognised(alias, expected):
    assert by_name(alias).name == expected


def test_an_unknown_name_gives_suggestions():
    with pytest.raises(RequestError, match="schedule: 'karass' is not known; did you mean 'Karras'"):
        by_name("karass")

"""Distributions of timesteps, compared with diffusers' formulas, with integrals and with frequencies."""

from __future__ import annotations

import math

import pytest
import torch

from gouache.errors import RequestError
from gouache.training.objective import step_generator
from gouache.training.timesteps import Timesteps

U = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)


def test_the_mode_distribution_is_the_formula_of_diffusers():
    from diffusers.training_utils import compute_density_for_timestep_sampling

    expected = compute_density_for_timestep_sampling("mode", 5, mode_scale=1.29, generator=step_generator(0, 1))
    drawn = torch.rand(5, generator=step_generator(0, 1))
    found = Timesteps("mode", scale=1.29).quantile(1 - drawn.double())  # theirs decreases with the uniform number

    torch.testing.assert_close(found.float(), expected, atol=1e-6, rtol=0)


def test_the_logit_of_logit_normal_has_mean_and_deviation_of_the_normal_in_diffusers():
    from diffusers.training_utils import compute_density_for_timestep_sampling

    theirs = compute_density_for_timestep_sampling(
        "logit_normal", 200_000, logit_mean=0.4, logit_std=1.5, generator=step_generator(0, 2)
    )
    probabilities = torch.linspace(0.05, 0.95, 19)

    found = Timesteps("logit-normal", mean=0.4, scale=1.5).quantile(probabilities.double())

    torch.testing.assert_close(found.float(), theirs.quantile(probabilities), atol=5e-3, rtol=0)


def test_the_cosine_map_is_the_inverse_of_the_integral_of_its_density():
    # density 2 / (pi - 2 pi x + 2 pi x^2): its integral is atan(x / (1 - x)) * 2 / pi
    x = Timesteps("cos-map").quantile(U)

    torch.testing.assert_close(torch.atan(x / (1 - x)) * 2 / math.pi, U, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("chosen", "cumulative"),
    [
        (Timesteps("uniform"), lambda x: x),
        (Timesteps("beta"), lambda x: 3 * x**2 - 2 * x**3),  # 6 x (1 - x)
        (Timesteps("beta", alpha=3, beta=1), lambda x: x**3),
        (
            Timesteps("sigmoid", scale=4, mean=0.1),
            lambda x: (
                ((1 + (4 * (x - 0.6)).exp()).log() - math.log(1 + math.exp(-2.4)))
                / (math.log(1 + math.exp(1.6)) - math.log(1 + math.exp(-2.4)))
            ),
        ),
        (
            Timesteps("parabola", scale=5, mean=-0.1),
            lambda x: (2 * x - 5 / 3 * ((x - 0.4) ** 3 + 0.064)) / (2 - 5 / 3 * (0.216 + 0.064)),
        ),
    ],
    ids=lambda value: value.distribution if isinstance(value, Timesteps) else "",
)
def test_quantiles_invert_the_integral_of_the_density(chosen, cumulative):
    torch.testing.assert_close(cumulative(chosen.quantile(U)), U, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["uniform", "logit-normal", "mode", "cos-map", "sigmoid", "parabola", "beta"])
def test_samples_have_the_frequencies_of_the_quantiles_within_the_range(name):
    chosen = Timesteps(name, first=200, last=700)

    t = chosen.sample(50_000, 1000, step_generator(0, 3))

    assert t.dtype == torch.int64 and int(t.min()) >= 200 and int(t.max()) < 700
    probabilities = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    expected = 200 + 500 * chosen.quantile(probabilities)
    # (9 quantiles of 50,000 samples, each within 5 deviations of its own sampling error)
    below = torch.stack([(t < edge).double().mean() for edge in expected.ceil()])
    exact = torch.stack([(chosen.quantile(U) * 500 + 200 < edge).double().mean() for edge in expected.ceil()])
    assert (below - exact).abs().max() < 5 * 0.5 / 50_000**0.5 + 2e-3


def test_every_level_of_a_uniform_range_is_sampled_and_one_level_alone_can_be():
    t = Timesteps(first=990).sample(1000, 1000, step_generator(0, 4))

    assert sorted(set(t.tolist())) == list(range(990, 1000))
    assert Timesteps(first=5, last=6).sample(9, 1000, step_generator(0, 5)).tolist() == [5] * 9


def test_a_shift_of_three_is_the_formula_of_sd3():
    shifted = Timesteps("logit-normal", shift=3.0).quantile(U)
    plain = Timesteps("logit-normal").quantile(U)

    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    assert bool((shifted > plain).all())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"distribution": "normal"}, "distribution 'normal' is not known; use uniform, logit-normal"),
        ({"shift": 0.0}, "shift, alpha and beta must be positive"),
        ({"distribution": "mode", "scale": 2.0}, "at most 1.75, got 2"),
    ],
)
def test_impossible_values_are_refused(values, words):
    with pytest.raises(RequestError, match=words):
        Timesteps(**values)


@pytest.mark.parametrize(("first", "last"), [(0, 1001), (500, 500), (-1, 10)])
def test_a_range_outside_the_levels_is_refused(first, last):
    with pytest.raises(RequestError, match=f"the range {first} to {last} is not within the 1000 levels"):
        Timesteps(first=first, last=last).sample(1, 1000, step_generator(0, 0))


def test_a_density_that_is_zero_everywhere_is_refused():
    with pytest.raises(RequestError, match="no timestep has a positive density"):
        Timesteps("parabola", mean=5.0, scale=10.0).sample(1, 1000, step_generator(0, 0))

"""Stochastic samplers sample the right distribution: for a Gaussian, the result has its standard deviation."""

from __future__ import annotations

from functools import partial

import pytest

from gouache.diffusion.noise import Noise
from gouache.diffusion.samplers.catalog import SAMPLERS, find, plan
from gouache.diffusion.samplers.ddim import ddim
from gouache.diffusion.schedule import Schedule

from .mixture import gaussian

SHAPE = (1, 100, 100)
SIGMAS = plan(find("Euler")[0], "Karras", Schedule.scaled_linear(), 120)
DEVIATION = 0.6

# LCM is excluded: it needs a consistency model; the posterior mean used here has a smaller deviation.
STOCHASTIC = {info.name: info.function for info in SAMPLERS if info.uses_noise and info.name != "LCM"}
STOCHASTIC["DDIM, eta 1"] = partial(ddim, eta=1.0)
FIRST_ORDER = ("Euler a", "DDPM", "DDIM, eta 1")


@pytest.mark.parametrize("name", STOCHASTIC)
def test_samples_of_a_gaussian_have_its_mean_and_standard_deviation(name):
    noise = Noise([12], SHAPE)

    x = STOCHASTIC[name](gaussian(DEVIATION), noise.start() * SIGMAS[0], SIGMAS, noise=noise)

    # For 10,000 values the standard error of the mean is 1 %, of the deviation 0.7 %; the rest is from 120 steps.
    assert abs(float(x.mean())) < 0.03 * DEVIATION
    assert abs(float(x.std()) / DEVIATION - 1) < (0.05 if name in FIRST_ORDER else 0.025)

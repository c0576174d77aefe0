"""Convergence orders: the error of each sampler falls with the power of the step size that its method promises.

The model is a mixture of Gaussians, whose optimal denoiser has a closed form; the reference solution of its
probability-flow ODE is computed by Runge-Kutta of order 4 with small steps, in float64.
"""

from __future__ import annotations

import math
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor

from gouache.diffusion.samplers.ddim import ddim, plms
from gouache.diffusion.samplers.dpm import dpm2, dpm2_ancestral
from gouache.diffusion.samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s_ancestral, dpmpp_3m_sde, dpmpp_sde
from gouache.diffusion.samplers.euler import euler, euler_ancestral, heun
from gouache.diffusion.samplers.lms import deis, lms
from gouache.diffusion.samplers.sampler import Step
from gouache.diffusion.samplers.unipc import unipc

from .mixture import mixture

HIGHEST, LOWEST = 40.0, 0.2

# Multistep methods start with lower orders. Where the error of the first steps dominates, the run has order 2 in the
# limit, whatever the order of the method; that order is tested on polynomials below.
ORDERS = {
    "euler": (euler, 1),
    "euler_ancestral": (partial(euler_ancestral, eta=0.0), 1),
    "ddim": (ddim, 1),
    "heun": (heun, 2),
    "dpm2": (dpm2, 2),
    "dpm2_ancestral": (partial(dpm2_ancestral, eta=0.0), 2),
    "dpmpp_2s_ancestral": (partial(dpmpp_2s_ancestral, eta=0.0), 2),
    "dpmpp_2m": (dpmpp_2m, 2),
    "dpmpp_sde": (partial(dpmpp_sde, eta=0.0), 2),
    "dpmpp_2m_sde": (partial(dpmpp_2m_sde, eta=0.0), 2),
    "dpmpp_2m_sde heun": (partial(dpmpp_2m_sde, eta=0.0, solver_type="heun"), 2),
    "dpmpp_3m_sde": (partial(dpmpp_3m_sde, eta=0.0), 2),
    "plms": (plms, 2),
    "unipc 1": (partial(unipc, order=1), 2),  # the corrector adds one order
    "unipc bh1": (unipc, 2),
    "unipc bh2": (partial(unipc, variant="bh2"), 2),
    "lms 1": (partial(lms, order=1), 1),
    "lms 2": (partial(lms, order=2), 2),
    "lms 3": (partial(lms, order=3), 3),
    "lms 4": (lms, 3.5),
    "deis 2": (partial(deis, order=2), 2),
    "deis 3": (deis, 3),
}


class NoNoise:
    """A noise source that fails when it is used."""

    draw = between = property(lambda self: pytest.fail("a deterministic sampler requested noise"))


def start() -> Tensor:
    return HIGHEST * torch.linspace(-2, 2, 33, dtype=torch.float64).reshape(1, 1, 1, 33)


@cache
def reference() -> Tensor:
    def slope(u: float, x: Tensor) -> Tensor:  # with respect to u = ln sigma
        return x - mixture(x, torch.tensor(math.exp(u), dtype=torch.float64))

    steps, x, u = 2000, start(), math.log(HIGHEST)
    h = (math.log(LOWEST) - u) / steps
    for _ in range(steps):
        k1 = slope(u, x)
        k2 = slope(u + h / 2, x + h / 2 * k1)
        k3 = slope(u + h / 2, x + h / 2 * k2)
        k4 = slope(u + h, x + h * k3)
        x, u = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), u + h
    return x


@pytest.mark.parametrize("name", ORDERS)
def test_the_error_decreases_with_the_order_of_the_method(name):
    sampler, order = ORDERS[name]

    errors = []
    for steps in (80, 160):
        sigmas = torch.linspace(math.log(HIGHEST), math.log(LOWEST), steps + 1, dtype=torch.float64).exp()
        x = sampler(mixture, start(), sigmas, noise=NoNoise())
        errors.append(float((x - reference()).abs().max()))

    assert errors[1] < 0.02
    assert math.log2(errors[0] / errors[1]) > order - 0.15


POLYNOMIAL = np.polynomial.Polynomial([0.3, -0.7, 0.25, 0.06])
EXACT_IN_SIGMA = {"lms 4": (lms, 3), "lms 3": (partial(lms, order=3), 2), "lms 2": (partial(lms, order=2), 1)}
EXACT_IN_LOG_SIGMA = {"deis 3": (deis, 2), "deis 2": (partial(deis, order=2), 1)}
EXACT_IN_X0 = {
    "unipc 3 bh1": (unipc, 2),
    "unipc 3 bh2": (partial(unipc, variant="bh2"), 2),
}


def inner_steps(sampler, denoise, sigmas: Tensor) -> list[tuple[float, float, float, float]]:
    """(sigma, x, sigma_next, x_next) of the steps of full order: all but the first and last three."""
    steps: list[Step] = []
    sampler(denoise, torch.full((1, 1, 1, 1), 5.0, dtype=torch.float64), sigmas, noise=NoNoise(), on_step=steps.append)
    levels, values = sigmas.tolist(), [float(step.x) for step in steps]
    return [(levels[i], values[i - 1], levels[i + 1], values[i]) for i in range(3, len(steps) - 3)]


def truncated(degree: int) -> np.polynomial.Polynomial:
    return POLYNOMIAL.cutdeg(degree)


@pytest.mark.parametrize("name", EXACT_IN_SIGMA)
def test_adams_methods_are_exact_for_slopes_polynomial_in_sigma(name):
    sampler, degree = EXACT_IN_SIGMA[name]
    slope, integral = truncated(degree), truncated(degree).integ()
    sigmas = torch.tensor([9.0, 8.2, 7.0, 6.5, 5.0, 4.1, 3.0, 2.4, 1.5, 1.0, 0.5], dtype=torch.float64)

    for sigma, x, sigma_next, x_next in inner_steps(sampler, lambda x, s: x - s * slope(float(s)), sigmas):
        assert x_next - x == pytest.approx(integral(sigma_next) - integral(sigma), abs=1e-10)


def test_plms_is_exact_for_cubic_slopes_at_even_steps():
    slope, integral = truncated(3), truncated(3).integ()
    sigmas = torch.linspace(9, 0.5, 11, dtype=torch.float64)

    for sigma, x, sigma_next, x_next in inner_steps(plms, lambda x, s: x - s * slope(float(s)), sigmas):
        assert x_next - x == pytest.approx(integral(sigma_next) - integral(sigma), abs=1e-10)


@pytest.mark.parametrize("name", EXACT_IN_LOG_SIGMA)
def test_deis_is_exact_for_slopes_polynomial_in_ln_sigma(name):
    sampler, degree = EXACT_IN_LOG_SIGMA[name]
    slope = truncated(degree)
    sigmas = torch.tensor([9.0, 8.2, 7.0, 6.5, 5.0, 4.1, 3.0, 2.4, 1.5, 1.0, 0.5], dtype=torch.float64)

    def integral(sigma: float) -> float:  # the integral of p(ln s) ds is s (p - p' + p'' - ...)(ln s)
        return sigma * (slope - slope.deriv(1) + slope.deriv(2))(math.log(sigma))

    for sigma, x, sigma_next, x_next in inner_steps(sampler, lambda x, s: x - s * slope(math.log(s)), sigmas):
        assert x_next - x == pytest.approx(integral(sigma_next) - integral(sigma), abs=1e-10)


@pytest.mark.parametrize("name", EXACT_IN_X0)
def test_exponential_methods_are_exact_for_x0_that_is_polynomial_in_lambda(name):
    sampler, degree = EXACT_IN_X0[name]
    x0 = truncated(degree)
    particular = x0 - x0.deriv(1) + x0.deriv(2)  # solves dx/dlambda = x0 - x
    sigmas = torch.tensor([9.0, 8.2, 7.0, 6.5, 5.0, 4.1, 3.0, 2.4, 1.5, 1.0, 0.5], dtype=torch.float64)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.full_like(x, x0(-math.log(sigma)))

    for sigma, x, sigma_next, x_next in inner_steps(sampler, denoise, sigmas):
        remaining = sigma_next / sigma
        expected = particular(-math.log(sigma_next)) + remaining * (x - particular(-math.log(sigma)))
        assert x_next == pytest.approx(expected, abs=1e-10)

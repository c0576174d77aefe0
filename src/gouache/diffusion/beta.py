"""Quantiles of the Beta distribution, to avoid a dependency on scipy for one function."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def beta_quantile(share: Tensor, a: float, b: float) -> Tensor:
    """x with I_x(a, b) = share, the regularised incomplete beta function; share from 0 to 1, float64; a, b > 0."""
    below_half = share <= _incomplete_beta(torch.tensor(0.5, dtype=torch.float64), a, b)
    left = _left_quantile(torch.where(below_half, share, 0.0), a, b)
    right = 1 - _left_quantile(torch.where(below_half, 0.0, 1 - share), b, a)  # I_x(a, b) = 1 - I_(1 - x)(b, a)
    return torch.where(below_half, left, right)


def _left_quantile(share: Tensor, a: float, b: float) -> Tensor:
    """The quantile where it is at most 1/2, by bisection to full float64 precision."""
    low, high = torch.zeros_like(share), torch.full_like(share, 0.5)
    for _ in range(64):
        middle = (low + high) / 2
        too_low = _incomplete_beta(middle, a, b) < share
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return torch.where(share > 0, (low + high) / 2, 0.0)


def _incomplete_beta(x: Tensor, a: float, b: float) -> Tensor:
    """I_x(a, b) for x up to 1/2: the power series of the integrand t^(a-1) (1-t)^(b-1), integrated term by term."""
    n = torch.arange(60, dtype=torch.float64)  # each term is less than about half of the previous one
    coefficients = torch.cat([torch.ones(1, dtype=torch.float64), ((n + 1 - b) / (n + 1))[:-1].cumprod(0)]) / (a + n)
    return x[..., None] ** n @ coefficients * x**a * (math.gamma(a + b) / (math.gamma(a) * math.gamma(b)))

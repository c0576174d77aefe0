"""Denoiser: (x, sigma) -> x0 from a network's prediction, and the training target of that prediction.

A network is trained to predict either the noise ("eps") or the velocity ("v", Salimans and Ho 2022). Both have the same
form (Karras et al. 2022, eq. 7): x0 = c_skip * x + c_out * network(c_in * x, t). Sampling and the training target use
the same three factors, so they cannot disagree. SVD is "v" on a continuous schedule: only its t differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gouache.diffusion.schedule import Schedule
from gouache.errors import RequestError

Prediction = Literal["eps", "v"]

Network = Callable[[Tensor, Tensor], Tensor]
"""(input (B, C, H, W), t (B,)) -> prediction, shaped like the input. The conditioning is already bound."""


@dataclass(frozen=True)
class Scaling:
    """The preconditioning factors at one noise level: x0 = c_skip * x + c_out * network(c_in * x, t)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor


def scaling(prediction: Prediction, sigma: Tensor) -> Scaling:
    """The factors for a network that predicts `prediction`, shaped like sigma. Raises RequestError if it is unknown."""
    root = (sigma**2 + 1).sqrt()
    if prediction == "eps":
        return Scaling(torch.ones_like(sigma), -sigma, 1 / root)
    if prediction == "v":
        return Scaling(1 / root**2, -sigma / root, 1 / root)
    raise RequestError("prediction", f"{prediction!r} is not known; expected 'eps' or 'v'")


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x at level sigma (a scalar or (B,)) in variance-exploding scale: x0 + sigma * noise."""
    return x0 + per_image(sigma, x0) * noise


def target(prediction: Prediction, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The training target for the input `add_noise(x0, noise, sigma)`, shaped like x0; sigma is a scalar or (B,).

    This is the scaling solved for the network's prediction, with the division by sigma simplified algebraically, so
    that it is exact down to sigma = 0.
    """
    if prediction == "eps":
        return noise
    level = per_image(sigma, x0)
    return (noise - level * x0) * scaling(prediction, level).c_in


def min_snr(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Loss weights shaped like `snr` (Hang et al. 2023): min(snr, gamma) weights x0, converted to the target's scale.

    The conversion divides by snr for eps, by snr + 1 for v. At an SNR of 0 the weights are finite: 1 for eps, 0 for v.
    """
    if prediction == "eps":
        return (gamma / snr).clamp_max(1)
    return snr.clamp_max(gamma) / (snr + 1)


@dataclass(frozen=True)
class Denoiser:
    """A network as a function (x, sigma) -> x0. Arithmetic outside the network is float32 (or float64, if x is)."""

    network: Network
    schedule: Schedule
    prediction: Prediction = "eps"

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The x0 prediction for x (B, C, H, W) at noise level sigma (a scalar or (B,)), shaped like x."""
        x = _at_least_float32(x)
        factors = scaling(self.prediction, per_image(sigma, x))
        return factors.c_skip * x + factors.c_out * self._predict(x, sigma, factors)

    def output(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The network's own output (eps or v) for x (B, C, H, W) at noise level sigma, shaped like x."""
        x = _at_least_float32(x)
        return self._predict(x, sigma, scaling(self.prediction, per_image(sigma, x)))

    def loss_terms(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(prediction, target) for x0 with `noise` added at level sigma (B,): both (B, C, H, W)."""
        x0 = _at_least_float32(x0)
        x = add_noise(x0, noise, sigma)
        factors = scaling(self.prediction, per_image(sigma, x))
        return self._predict(x, sigma, factors), target(self.prediction, x0, noise, sigma)

    def _predict(self, x: Tensor, sigma: Tensor, factors: Scaling) -> Tensor:
        t = self.schedule.t(sigma).to(x.device).expand(len(x))
        return self.network(x * factors.c_in, t).to(x.dtype)


def per_image(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma, a scalar or one value per image (B,), on x's dtype and device, reshaped to broadcast against x."""
    return sigma.to(x).reshape(-1, *[1] * (x.ndim - 1))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

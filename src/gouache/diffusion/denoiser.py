"""(x, sigma) -> x0: what a network says, turned into the picture it sees, and what it should have said.

A network is trained to say either the noise ("eps") or the velocity ("v", Salimans and Ho 2022). Both are the same
pattern (Karras et al. 2022, eq. 7): x0 = c_skip * x + c_out * network(c_in * x, t). Sampling and the training target
read the same three factors, so they cannot disagree. SVD is "v" on a continuous schedule: only its t differs.
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
"""(input (B, C, H, W), t (B,)) -> what it says, shaped like the input; everything else it is told is already bound."""


@dataclass(frozen=True)
class Scaling:
    """The factors around the network at one noise level: x0 = c_skip * x + c_out * network(c_in * x, t)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor


def scaling(prediction: Prediction, sigma: Tensor) -> Scaling:
    """The factors for a network that says `prediction`, shaped like sigma."""
    root = (sigma**2 + 1).sqrt()
    if prediction == "eps":
        return Scaling(torch.ones_like(sigma), -sigma, 1 / root)
    if prediction == "v":
        return Scaling(1 / root**2, -sigma / root, 1 / root)
    raise RequestError("prediction", f"{prediction!r} is not known; a network predicts 'eps' or 'v'")


def noised(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x at level sigma (a scalar or (B,)), in the variance-exploding scale: x0 + sigma * noise."""
    return x0 + per_image(sigma, x0) * noise


def target(prediction: Prediction, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """What a network ought to say of `noised(x0, noise, sigma)`; shaped like x0.

    The solution of the scaling for the network's part, with the division by sigma carried out by hand: exact down
    to sigma = 0. sigma is a scalar or (B,).
    """
    if prediction == "eps":
        return noise
    level = per_image(sigma, x0)
    return (noise - level * x0) * scaling(prediction, level).c_in


def min_snr(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Loss weights shaped like `snr` (Hang et al. 2023): min(snr, gamma), as a weight of x0, put on the target's scale.

    For eps that divides by snr, for v by snr + 1. At an SNR of 0 they are finite: 1 for eps, 0 for v.
    """
    if prediction == "eps":
        return (gamma / snr).clamp_max(1)
    return snr.clamp_max(gamma) / (snr + 1)


@dataclass(frozen=True)
class Denoiser:
    """A network seen as (x, sigma) -> x0. Arithmetic outside the network is float32 (or float64, if x is)."""

    network: Network
    schedule: Schedule
    prediction: Prediction = "eps"

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The picture x0 in x (B, C, H, W), which holds noise of level sigma (a scalar or (B,))."""
        x = _at_least_float32(x)
        factors = scaling(self.prediction, per_image(sigma, x))
        return factors.c_skip * x + factors.c_out * self._said(x, sigma, factors)

    def loss_terms(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(what the network says, what it should say) of x0 under `noise` at level sigma (B,): both (B, C, H, W)."""
        x0 = _at_least_float32(x0)
        x = noised(x0, noise, sigma)
        factors = scaling(self.prediction, per_image(sigma, x))
        return self._said(x, sigma, factors), target(self.prediction, x0, noise, sigma)

    def _said(self, x: Tensor, sigma: Tensor, factors: Scaling) -> Tensor:
        t = self.schedule.t(sigma).to(x.device).expand(len(x))
        return self.network(x * factors.c_in, t).to(x.dtype)


def per_image(sigma: Tensor, x: Tensor) -> Tensor:
    """A scalar sigma, or one value an image (B,), with x's dtype and device, in a shape that multiplies x."""
    return sigma.to(x).reshape(-1, *[1] * (x.ndim - 1))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

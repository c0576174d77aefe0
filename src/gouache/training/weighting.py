"""How much an error counts: by its noise level, by its size, and by its place in the picture."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gouache.diffusion.denoiser import Prediction, min_snr
from gouache.diffusion.schedule import Schedule

Weighting = Literal["none", "min-snr", "debiased", "velocity", "noise"]
Distance = Literal["l2", "l1", "huber", "smooth-l1"]
HuberSchedule = Literal["snr", "exponential", "constant"]

# Weights that divide by the SNR use one within these limits, so that they are finite at both ends of a schedule with
# zero terminal SNR. The levels of the ordinary schedule have an SNR from 0.0047 to 1176.
_LEAST_SNR, _MOST_SNR = 1e-3, 1e3


def level_weights(weighting: Weighting, gamma: float, prediction: Prediction, snr: Tensor) -> Tensor:
    """The weights of the squared error of the network's output (eps or v), shaped like `snr`.

    - "none": 1.
    - "min-snr": as a weight of the error in x0, min(SNR, gamma) (Hang et al. 2023).
    - "velocity": as a weight of the error in x0, min(SNR + 1, gamma + 1).
    - "noise": the error in the noise, whatever is predicted: 1 for eps, SNR / (SNR + 1) for v (kohya's
      scale_v_pred_loss_like_noise_pred).
    - "debiased": 1 / sqrt(SNR) for eps (Yu et al. 2023), 1 / (SNR + 1) for v, as in kohya's scripts.
    """
    limited = snr.clamp(_LEAST_SNR, _MOST_SNR)
    match weighting:
        case "none":
            return torch.ones_like(snr)
        case "min-snr":
            return min_snr(snr, gamma, prediction)
        case "velocity":
            x0_weight = (snr + 1).clamp_max(gamma + 1)
            return x0_weight / (snr.clamp_min(_LEAST_SNR) if prediction == "eps" else snr + 1)
        case "noise":
            return torch.ones_like(snr) if prediction == "eps" else limited / (limited + 1)
        case "debiased":
            return limited.rsqrt() if prediction == "eps" else 1 / (limited + 1)


def v_like(factor: float, snr: Tensor) -> Tensor:
    """kohya's v_pred_like_loss: 1 + factor * (SNR + 1) / SNR, which multiplies any other weight of an eps model."""
    limited = snr.clamp(_LEAST_SNR, _MOST_SNR)
    return 1 + factor * (limited + 1) / limited


def distance(kind: Distance, difference: Tensor, threshold: Tensor) -> Tensor:
    """The loss of each number, shaped like `difference` (B, C, h, w); `threshold` (B,) is c of the last two.

    "huber" is 2c (sqrt(d^2 + c^2) - c) and "smooth-l1" 2 (sqrt(d^2 + c^2) - c): the pseudo-Huber forms of kohya's
    scripts (Khrapov et al. 2024). Near 0 the former is d^2.
    """
    if kind == "l2":
        return difference.pow(2)
    if kind == "l1":
        return difference.abs()
    c = threshold.to(difference)[:, None, None, None]
    root = 2 * ((difference.pow(2) + c**2).sqrt() - c)
    return c * root if kind == "huber" else root


def huber_threshold(kind: HuberSchedule, c: float, scale: float, schedule: Schedule, t: Tensor) -> Tensor:
    """The threshold (B,) at timesteps t (B,), as in kohya's scripts (huber_schedule, huber_c, huber_scale).

    "constant": c * scale. "exponential": from scale at t = 0 to c * scale at t = T. "snr": (1 - c) / (1 + sigma)^2 + c.
    """
    if kind == "constant":
        return torch.full(t.shape, c * scale)
    if kind == "exponential":
        return scale * c ** (t / len(schedule.sigmas))
    return (1 - c) / (1 + schedule.sigma(t)) ** 2 + c


def masked_mean(values: Tensor, mask: Tensor | None, unmasked_weight: float = 0.0) -> Tensor:
    """The mean (B,) of `values` (B, C, h, w), each weighted by `mask` (B, 1, h, w) and divided by the mask's area.

    So a small mask trains as strongly as a large one. `unmasked_weight` is the weight where the mask is 0. A picture
    whose mask is empty has the mean 0.
    """
    if mask is None:
        return values.flatten(1).mean(1)
    weight = mask.to(values) * (1 - unmasked_weight) + unmasked_weight
    area = weight.flatten(1).sum(1) * values.shape[1]
    return (values * weight).flatten(1).sum(1) / area.clamp_min(torch.finfo(values.dtype).tiny)

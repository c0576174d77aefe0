"""The noise levels a model was trained on, and what time the network is told at each.

Sigma is the standard deviation of the noise in the variance-exploding scale x = x0 + sigma * n. A discrete model
(SD1, SD2, SDXL) knows T levels and is told their index, which may be fractional: between two levels ln sigma is
linear in the index, as in k-diffusion. A continuous model (SVD) is told ln(sigma) / 4 (Karras et al. 2022, table 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gouache.errors import RequestError

LOWEST_TERMINAL_ALPHA = 4.8973451890853435e-08
"""Stands for the zero that a terminal SNR of zero would put into alphas_cumprod, so that sigma stays finite (4518.8).

Every tool in use clamps at this very number, hence the same noise levels, hence the same pictures.
"""


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise levels `sigmas` (T,), rising, float32 on the CPU; `continuous` models are told ln(sigma) / 4."""

    sigmas: Tensor
    continuous: bool = False

    def __post_init__(self) -> None:
        if self.sigmas.ndim != 1 or len(self.sigmas) < 2 or not bool((self.sigmas.diff() > 0).all()):
            raise RequestError("schedule", "the noise levels of a model must be two or more, rising")

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> Schedule:
        """From the share of signal variance left at each step (T,), falling: sigma^2 = (1 - a) / a."""
        alphas = alphas_cumprod.detach().to("cpu", torch.float64)
        return cls(((1 - alphas) / alphas).sqrt().float())

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> Schedule:
        """The square root of beta rises linearly: all of Stable Diffusion (its configurations call it "linear")."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
        return cls.from_alphas_cumprod((1 - roots**2).cumprod(0))

    @classmethod
    def linear(cls, beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000) -> Schedule:
        """Beta rises linearly (Ho et al. 2020)."""
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        return cls.from_alphas_cumprod((1 - betas).cumprod(0))

    @classmethod
    def edm(cls, sigma_min: float = 0.002, sigma_max: float = 700.0, levels: int = 1000) -> Schedule:
        """A continuous model of levels sigma_min to sigma_max; `sigmas` are samples of them, even in ln sigma."""
        ends = torch.tensor([sigma_min, sigma_max], dtype=torch.float64).log()
        return cls(torch.linspace(float(ends[0]), float(ends[1]), levels, dtype=torch.float64).exp().float(), True)

    def zero_terminal_snr(self) -> Schedule:
        """The same levels stretched until the last holds no signal (Lin et al. 2023, algorithm 1).

        sqrt(alphas_cumprod) is shifted so that its last value is 0 and scaled so that its first stays.
        """
        root = self._alphas_cumprod.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        return Schedule.from_alphas_cumprod((root**2).clamp_min(LOWEST_TERMINAL_ALPHA))

    @property
    def sigma_min(self) -> float:
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        return float(self.sigmas[-1])

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float32: the share of signal variance, 1 / (1 + sigma^2)."""
        return self._alphas_cumprod.float()

    def sigma(self, t: Tensor | float) -> Tensor:
        """The level at time `t`, float32 on the CPU, shaped like t; t outside the trained range is held at its ends."""
        time = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        if self.continuous:
            return (4 * time).exp().clamp(self.sigma_min, self.sigma_max).float()
        time = time.clamp(0, len(self.sigmas) - 1)
        low = time.floor().long()
        high = time.ceil().long()
        return torch.lerp(self._log_sigmas[low], self._log_sigmas[high], time - low).exp().float()

    def t(self, sigma: Tensor | float, quantize: bool = False) -> Tensor:
        """The time at level `sigma`, float32 on the CPU, shaped like sigma; `quantize` takes the nearest trained level.

        A discrete model's levels are clamped to the trained range: it has no other times to be told.
        """
        log_sigma = torch.as_tensor(sigma, device="cpu").to(torch.float64).log()
        if self.continuous:
            return (log_sigma / 4).float()
        if quantize:
            return (log_sigma[..., None] - self._log_sigmas).abs().argmin(-1).float()
        high = torch.searchsorted(self._log_sigmas, log_sigma).clamp(1, len(self.sigmas) - 1)
        below, above = self._log_sigmas[high - 1], self._log_sigmas[high]
        share = ((log_sigma - below) / (above - below)).clamp(0, 1)
        return (high - 1 + share).float()

    def snr(self, t: Tensor | float) -> Tensor:
        """Signal to noise at time `t`, a ratio of variances: 1 / sigma^2."""
        return 1 / self.sigma(t) ** 2

    # Logarithms in float64: exp(log(sigma)) then rounds back to the very float32 it came from, so that trained
    # levels map to whole times and back without a last bit's difference.
    @cached_property
    def _log_sigmas(self) -> Tensor:
        return self.sigmas.double().log()

    @cached_property
    def _alphas_cumprod(self) -> Tensor:
        return 1 / (1 + self.sigmas.double() ** 2)

"""The noise levels a model was trained on, and the timestep t that the network receives at each.

Sigma is the standard deviation of the noise in variance-exploding scale, x = x0 + sigma * n. A discrete model (SD1,
SD2, SDXL) has T levels; its t is the index of a level and may be fractional: between two levels ln sigma is linear in
the index, as in k-diffusion. For a continuous model (SVD) t is ln(sigma) / 4 (Karras et al. 2022, table 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gouache.errors import RequestError

LOWEST_TERMINAL_ALPHA = 4.8973451890853435e-08
"""Replaces the last alphas_cumprod of 0 that zero terminal SNR gives, so that sigma stays finite (4518.8).

Every common tool clamps at exactly this number; a different one would give other noise levels and other images.
"""


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise levels `sigmas` (T,), increasing, float32 on the CPU; if `continuous`, the timestep is ln(sigma) / 4."""

    sigmas: Tensor
    continuous: bool = False

    def __post_init__(self) -> None:
        if self.sigmas.ndim != 1 or len(self.sigmas) < 2 or not bool((self.sigmas.diff() > 0).all()):
            raise RequestError("schedule", "expected two or more noise levels in strictly increasing order")

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> Schedule:
        """From alphas_cumprod (T,), the decreasing fraction of signal variance per timestep: sigma^2 = (1 - a) / a."""
        alphas = alphas_cumprod.detach().to("cpu", torch.float64)
        return cls(((1 - alphas) / alphas).sqrt().float())

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> Schedule:
        """The square root of beta increases linearly: all Stable Diffusion models (their configs call it "linear")."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
        return cls.from_alphas_cumprod((1 - roots**2).cumprod(0))

    @classmethod
    def linear(cls, beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000) -> Schedule:
        """Beta increases linearly (Ho et al. 2020)."""
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        return cls.from_alphas_cumprod((1 - betas).cumprod(0))

    @classmethod
    def edm(cls, sigma_min: float = 0.002, sigma_max: float = 700.0, levels: int = 1000) -> Schedule:
        """A continuous schedule from sigma_min to sigma_max; `sigmas` are samples of it, evenly spaced in ln sigma."""
        ends = torch.tensor([sigma_min, sigma_max], dtype=torch.float64).log()
        return cls(torch.linspace(float(ends[0]), float(ends[1]), levels, dtype=torch.float64).exp().float(), True)

    def zero_terminal_snr(self) -> Schedule:
        """The schedule rescaled so that the last level has no signal (Lin et al. 2023, algorithm 1).

        sqrt(alphas_cumprod) is shifted so that its last value is 0 and scaled so that its first value is unchanged.
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
        """(T,) float32: the fraction of signal variance, 1 / (1 + sigma^2)."""
        return self._alphas_cumprod.float()

    def sigma(self, t: Tensor | float) -> Tensor:
        """The level at timestep `t`, float32 on the CPU, shaped like t; t is clamped to the trained range."""
        time = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        if self.continuous:
            return (4 * time).exp().clamp(self.sigma_min, self.sigma_max).float()
        time = time.clamp(0, len(self.sigmas) - 1)
        low = time.floor().long()
        high = time.ceil().long()
        return torch.lerp(self._log_sigmas[low], self._log_sigmas[high], time - low).exp().float()

    def t(self, sigma: Tensor | float, quantize: bool = False) -> Tensor:
        """The timestep at level `sigma`, float32 on the CPU, shaped like sigma; `quantize` rounds to a trained level.

        `quantize` selects the nearest level in ln sigma. For a discrete model sigma is clamped to the trained range,
        as it has no timesteps outside it.
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
        """Signal-to-noise ratio at timestep `t`, a ratio of variances: 1 / sigma^2."""
        return 1 / self.sigma(t) ** 2

    # Logarithms in float64: exp(log(sigma)) then rounds to the original float32, so that trained levels map to integer
    # timesteps and back bit-exactly.
    @cached_property
    def _log_sigmas(self) -> Tensor:
        with torch.inference_mode(False):  # kept, also for training
            return self.sigmas.double().log()

    @cached_property
    def _alphas_cumprod(self) -> Tensor:
        with torch.inference_mode(False):
            return 1 / (1 + self.sigmas.double() ** 2)

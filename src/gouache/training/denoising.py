"""The objective of latent diffusion: predict the noise (or velocity) in a noised latent from its conditioning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.denoiser import Denoiser, Prediction, min_snr
from gouache.diffusion.schedule import Schedule
from gouache.training.batch import Batch
from gouache.training.objective import Group, Json, by_decay, step_generator

Weighting = Literal["min-snr", "velocity"]


@dataclass(frozen=True)
class Denoising:
    """The weighted squared error of a denoiser's network at random timesteps.

    `denoiser` returns the denoiser for a conditioning, as `Model.denoiser` does; its schedule and prediction are the
    ones trained for. `networks` are the modules it evaluates that are trained. `groups` are the trained parameters,
    by default all trainable ones of `networks`.

    `unconditional` (one row) replaces the conditioning of a share `dropout` of the images, so that the network also
    learns the unconditional prediction of classifier-free guidance. Parts that it does not have, such as the concat
    channels of an inpainting model, are kept.

    The loss is weighted by noise level, with a cap where there is little noise. As a weight of the error in x0,
    "min-snr" is min(SNR, gamma) (Hang et al. 2023), which gives almost no weight to the noisiest levels; "velocity" is
    min(SNR + 1, gamma + 1), the inherent weight of v-prediction (also chosen by Karras et al. 2022), with which a
    small model learns the layout of an image from its first steps. `channel_weights` (C,) multiply the squared errors
    of the latent channels.

    `autocast` runs the network in bfloat16 where that is faster. `data` identifies the data set and `base` the weights
    of frozen parameters, for instance by a hash; both are compared when a run is resumed.
    """

    denoiser: Callable[[Conditioning], Denoiser]
    networks: Mapping[str, nn.Module]
    unconditional: Conditioning
    seed: int
    dropout: float = 0.1
    gamma: float = 5.0
    weighting: Weighting = "min-snr"
    channel_weights: Tensor | None = None
    autocast: bool = False
    groups: tuple[Group, ...] = ()
    data: str | None = None
    base: str | None = None

    changeable: ClassVar[frozenset[str]] = frozenset()

    @property
    def schedule(self) -> Schedule:
        return self._unconditional_denoiser.schedule

    @property
    def prediction(self) -> Prediction:
        return self._unconditional_denoiser.prediction

    def parameter_groups(self) -> list[Group]:
        return list(self.groups) or by_decay(self.networks)

    def config(self) -> Mapping[str, Json]:
        # Without the numbers in `unconditional`: they come from a text encoder, whose last bits depend on the machine.
        weights = self.channel_weights
        return {
            "type": "denoising",
            "prediction": self.prediction,
            "schedule": describe_schedule(self.schedule),
            "dropout": self.dropout,
            "weighting": self.weighting,
            "gamma": self.gamma,
            "channel_weights": None if weights is None else [_rounded(value) for value in weights.tolist()],
            "autocast": self.autocast,
            "seed": self.seed,
            "data": self.data,
            "base": self.base,
        }

    def losses(self, batch: Batch, step: int) -> Mapping[str, Tensor]:
        generator = step_generator(self.seed, step)
        count = len(batch.latents)
        t = torch.randint(len(self.schedule.sigmas), (count,), generator=generator)
        noise = torch.randn(batch.latents.shape, generator=generator).to(batch.latents)
        drop = torch.rand(count, generator=generator) < self.dropout
        return {"loss": self.loss(batch, t, noise, drop).mean()}

    def loss(self, batch: Batch, t: Tensor, noise: Tensor, drop: Tensor) -> Tensor:
        """The weighted squared error of each image (B,) at timesteps t (B,) with `noise` (B, C, h, w).

        Where `drop` (B,) is true, the unconditional row replaces the conditioning.
        """
        assert batch.conditioning is not None
        denoiser = self.denoiser(batch.conditioning.where(drop, self.unconditional))
        if self.autocast:
            denoiser = _autocast(denoiser)
        output, target = denoiser.loss_terms(batch.latents, noise, denoiser.schedule.sigma(t))
        error = (output - target).pow(2)
        if self.channel_weights is not None:
            error = error * self.channel_weights.to(error)[:, None, None]
        error = error.flatten(1).mean(1)
        return self.loss_weights(t).to(error) * error

    def loss_weights(self, t: Tensor) -> Tensor:
        """The weights (B,) of the squared error of the network's output (eps or v) at timesteps t (B,)."""
        snr = self.schedule.snr(t)
        if self.weighting == "min-snr":
            return min_snr(snr, self.gamma, self.prediction)
        x0_weight = (snr + 1).clamp_max(self.gamma + 1)
        return x0_weight / (snr if self.prediction == "eps" else snr + 1)

    @cached_property
    def _unconditional_denoiser(self) -> Denoiser:
        return self.denoiser(self.unconditional)


def describe_schedule(schedule: Schedule) -> dict[str, Json]:
    """What identifies a schedule in a configuration. Zero-terminal SNR, for instance, shows as a sigma_max of 4518.8.

    Six digits rather than a hash: the last bit of a level may depend on the processor.
    """
    return {
        "levels": len(schedule.sigmas),
        "sigma_min": _rounded(schedule.sigma_min),
        "sigma_median": _rounded(float(schedule.sigmas.median())),
        "sigma_max": _rounded(schedule.sigma_max),
        "continuous": schedule.continuous,
    }


def _rounded(value: float) -> float:
    """To six significant digits."""
    return float(f"{value:.6g}")


def _autocast(denoiser: Denoiser) -> Denoiser:
    """The same denoiser, its network computed in bfloat16."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return denoiser.network(x, t)

    return replace(denoiser, network=network)

"""Latent diffusion's objective: say what noise (or velocity) hides a latent, told its caption or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.denoiser import Denoiser, Prediction, min_snr
from gouache.diffusion.schedule import Schedule
from gouache.nn.unet import UNet
from gouache.training.objective import Group, by_decay, chance

Weighting = Literal["min-snr", "velocity"]


@dataclass(frozen=True)
class Captioned:
    """`latents` (B, C, h, w), scaled to about unit variance, and what is said of them."""

    latents: Tensor
    said: Conditioning


@dataclass(frozen=True)
class Denoising:
    """`unsaid` (one row) stands in for a caption in `dropout` of the cases, so that guidance has a negative.

    Errors are weighted by noise level, capped where there is little noise. Seen as errors of the picture x0,
    "min-snr" counts them min(SNR, gamma) times (Hang et al. 2023), which says almost nothing of the noisiest levels;
    "velocity" counts them min(SNR + 1, gamma + 1) times, the weight that v-prediction has by nature (and Karras et
    al. 2022 choose), so that a small model learns what is where from its first steps.

    `counts` (C,) says how much the errors of each latent channel count, beside each other; None: all alike.
    `autocast` computes in bfloat16 where that is faster.
    """

    unet: UNet
    schedule: Schedule
    prediction: Prediction
    unsaid: Conditioning
    seed: int
    dropout: float = 0.1
    gamma: float = 5.0
    weighting: Weighting = "min-snr"
    counts: Tensor | None = None
    autocast: bool = False

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"unet": self.unet}

    def groups(self) -> list[Group]:
        return by_decay(self.networks)

    def losses(self, batch: Captioned, step: int) -> Mapping[str, Tensor]:
        chances = chance(self.seed, step)
        count = len(batch.latents)
        t = torch.randint(len(self.schedule.sigmas), (count,), generator=chances)
        noise = torch.randn(batch.latents.shape, generator=chances).to(batch.latents)
        silent = torch.rand(count, generator=chances) < self.dropout
        return {"loss": self.loss(batch, t, noise, silent).mean()}

    def loss(self, batch: Captioned, t: Tensor, noise: Tensor, silent: Tensor) -> Tensor:
        """The weighted squared error of each image (B,), at times t (B,), under `noise`.

        Where `silent` (B,) is true, the caption is not told.
        """
        sigma = self.schedule.sigma(t)
        heard = batch.said.context
        context = torch.where(silent.to(heard.device)[:, None, None], self.unsaid.context.to(heard), heard)

        def network(x: Tensor, time: Tensor) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
                return self.unet(x, time, context).to(x.dtype)

        said, target = Denoiser(network, self.schedule, self.prediction).loss_terms(batch.latents, noise, sigma)
        error = (said - target).pow(2)
        if self.counts is not None:
            error = error * self.counts.to(error)[:, None, None]
        error = error.flatten(1).mean(1)
        return self.weights(t).to(error) * error

    def weights(self, t: Tensor) -> Tensor:
        """What the error of the network's own output counts at times t (B,), whatever it predicts."""
        snr = self.schedule.snr(t)
        if self.weighting == "min-snr":
            return min_snr(snr, self.gamma, self.prediction)
        picture = (snr + 1).clamp_max(self.gamma + 1)
        return picture / (snr if self.prediction == "eps" else snr + 1)

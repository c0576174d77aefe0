"""Small objectives: a linear regression for tests of the loop itself, and runs for processes that are killed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.denoiser import Denoiser, Prediction
from gouache.diffusion.schedule import Schedule
from gouache.nn.spec import VaeSpec
from gouache.nn.vae import Autoencoder
from gouache.training.autoencoder import Pictures, Reconstruction, psnr
from gouache.training.loop import train
from gouache.training.objective import Group, Json, by_decay, step_generator
from gouache.training.settings import Settings


@dataclass(frozen=True)
class Regression:
    """Mean squared error of a linear layer; a batch is (x, y). `values` are its configuration."""

    net: nn.Linear
    groups: tuple[Group, ...] = ()
    values: Mapping[str, Json] = field(default_factory=dict)

    changeable: ClassVar[frozenset[str]] = frozenset({"scale"})

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"net": self.net}

    def parameter_groups(self) -> list[Group]:
        return list(self.groups) or by_decay(self.networks)

    def config(self) -> Mapping[str, Json]:
        return self.values

    def losses(self, batch: tuple[Tensor, Tensor], number: int, /) -> Mapping[str, Tensor]:
        x, y = batch
        return {"loss": (self.net(x) - y).pow(2).mean()}


def linear(seed: int = 0) -> nn.Linear:
    net = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return net


def regression(seed: int = 0, **values: Any) -> Regression:
    return Regression(linear(seed), values=values)


def points(number: int) -> tuple[Tensor, Tensor]:
    values = torch.randn(4, 5, generator=step_generator(0, number))
    return values[:, :3], values[:, 3:]


def settings(**values: Any) -> Settings:
    plain = {"steps": 6, "batch": 4, "learning_rate": 0.01, "warmup": 0, "schedule": "constant", "save_seconds": 1e9}
    return Settings(**{**plain, **values})


def denoiser_factory(
    network: Callable[..., Tensor], schedule: Schedule, prediction: Prediction
) -> Callable[[Conditioning], Denoiser]:
    """The denoisers of `network(x, t, context, vector)`, whose vector may be left out."""

    def denoiser(conditioning: Conditioning) -> Denoiser:
        inputs = [part for part in (conditioning.context, conditioning.vector) if part is not None]

        def call(x: Tensor, t: Tensor) -> Tensor:
            if conditioning.concat is not None:
                x = torch.cat([x, conditioning.concat], dim=1)
            return network(x, t, *inputs)

        return Denoiser(call, schedule, prediction)

    return denoiser


def small_autoencoder() -> Reconstruction:
    vae = Autoencoder(VaeSpec(channels=32, channel_mult=(1, 1), res_blocks=1, latent_channels=2))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    # Channels last, as in the recipes: a resumed run must use the same memory format.
    return Reconstruction(vae.to(memory_format=torch.channels_last), seed=3)


def pictures(number: int) -> Pictures:
    return Pictures(torch.rand(2, 3, 8, 16, generator=step_generator(1, number)) * 2 - 1)


def train_small_autoencoder(folder: Path, steps: int, save_seconds: float, hang_at: int = -1) -> None:
    """A run for a process of its own. `result.json` next to the folder records how it ended."""
    torch.set_num_threads(1)
    objective = small_autoencoder()
    unseen = pictures(10_000).images

    @torch.no_grad()
    def validate() -> Mapping[str, float]:
        return {"loss": -float(psnr(objective.vae.decode(objective.vae.encode(unseen).mean), unseen).mean())}

    def batches(number: int) -> Pictures:
        if number == hang_at:
            time.sleep(120)
        return pictures(number)

    result = train(
        objective,
        batches,
        settings(
            steps=steps,
            batch=2,
            schedule="cosine",
            warmup=3,
            accumulate=2,
            ema_decay=0.9,
            log_steps=1,
            validate_steps=4,
            save_seconds=save_seconds,
        ),
        folder,
        validate=validate,
    )
    values = {"step": result.step, "finished": result.finished}
    folder.with_name("result.json").write_text(json.dumps(values))

"""Small things to train: a linear regression for the loop's own manners, and runs for processes that get killed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gouache.nn.spec import VaeSpec
from gouache.nn.vae import Autoencoder
from gouache.training.autoencoder import Pictures, Reconstruction, psnr
from gouache.training.loop import train
from gouache.training.objective import Group, by_decay, chance
from gouache.training.settings import Settings


@dataclass(frozen=True)
class Regression:
    """Mean squared error of a linear layer; a batch is (x, y)."""

    net: nn.Linear
    own_groups: tuple[Group, ...] = ()

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"net": self.net}

    def groups(self) -> list[Group]:
        return list(self.own_groups) or by_decay(self.networks)

    def losses(self, batch: tuple[Tensor, Tensor], step: int) -> Mapping[str, Tensor]:
        x, y = batch
        return {"loss": (self.net(x) - y).pow(2).mean()}


def regression(seed: int = 0) -> Regression:
    net = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return Regression(net)


def points(number: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randn(4, 5, generator=chance(0, number))
    return drawn[:, :3], drawn[:, 3:]


def settings(**values: Any) -> Settings:
    plain = {"steps": 6, "batch": 4, "learning_rate": 0.01, "warmup": 0, "schedule": "constant", "save_seconds": 1e9}
    return Settings(**{**plain, **values})


def small_autoencoder() -> Reconstruction:
    vae = Autoencoder(VaeSpec(channels=32, channel_mult=(1, 1), res_blocks=1, latent_channels=2))
    drawn = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=drawn) / parameter[0].numel() ** 0.5)
    # Channels last, as the recipes train: what is resumed must lie in memory as it did.
    return Reconstruction(vae.to(memory_format=torch.channels_last), seed=3)


def pictures(number: int) -> Pictures:
    return Pictures(torch.rand(2, 3, 8, 16, generator=chance(1, number)) * 2 - 1)


def train_small_autoencoder(folder: Path, steps: int, save_seconds: float, hang_at: int = -1) -> None:
    """A run for a process of its own. It notes in `result.json`, beside the folder, how it ended."""
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
    told = {"step": result.step, "finished": result.finished}
    folder.with_name("result.json").write_text(json.dumps(told))

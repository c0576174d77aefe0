"""The validation of a denoising objective: fixed pictures with fixed noise at a fixed grid of timesteps.

Nothing about it is random, so two validations differ by the weights alone. The noise depends on the picture and the
timestep, and the loss is the mean squared error of the network's output, without the weights that the training loss
has, so that it can be compared between runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gouache.training.batch import Batch
from gouache.training.denoising import Denoising
from gouache.training.evaluation import evaluating
from gouache.training.objective import step_generator


@dataclass(frozen=True)
class Validation:
    """The losses of pictures that are not trained on, and of a few that are.

    `held_out` gives "loss" and "loss at T" for each of `points` timesteps, `probe`, a sample of the training pictures,
    "training loss". Without held-out pictures, as for tiny sets, "loss" and "loss at T" are those of the probe.

    `identity` is a hash of the pictures and options that "loss" depends on.
    """

    objective: Denoising
    held_out: Sequence[Batch] = ()
    probe: Sequence[Batch] = ()
    points: int = 8
    identity: str | None = None

    def __call__(self) -> dict[str, float]:
        with evaluating(self.objective.networks):
            if not self.held_out:
                return grid_losses(self.objective, self.probe, self.points)
            losses = grid_losses(self.objective, self.held_out, self.points)
            if self.probe:
                losses["training loss"] = grid_losses(self.objective, self.probe, self.points)["loss"]
            return losses


@torch.no_grad()
def grid_losses(objective: Denoising, batches: Sequence[Batch], points: int) -> dict[str, float]:
    """The mean "loss" of all pictures and timesteps, and that of each timestep, "loss at T"."""
    times = timestep_grid(objective, points)
    sums, count = torch.zeros(len(times), dtype=torch.float64), sum(len(batch) for batch in batches)
    seen = 0
    for batch in batches:
        contents = batch.contents or [str(seen + row) for row in range(len(batch))]
        seen += len(batch)
        for column, t in enumerate(times):
            noise = torch.stack([_noise(content, t, batch.latents.shape[1:]) for content in contents])
            noise = noise.to(batch.latents)
            error = objective.squared_error(batch, torch.full((len(batch),), t), noise)
            sums[column] += error.double().sum().cpu()
    means = (sums / max(1, count)).tolist()
    return {"loss": sum(means) / len(means), **{f"loss at {t}": mean for t, mean in zip(times, means)}}


def _noise(content: str, t: int, shape: Sequence[int]) -> Tensor:
    """That of a picture with the hash `content` at timestep `t`."""
    seed = int(hashlib.sha256(f"validation {content}".encode()).hexdigest()[:15], 16)
    return torch.randn(*shape, generator=step_generator(seed, t))


def timestep_grid(objective: Denoising, points: int) -> list[int]:
    """The middles of `points` equal parts of the timesteps that are trained."""
    first, last = objective.timesteps.first, objective.timesteps.last or len(objective.schedule.sigmas)
    points = min(points, last - first)
    return [first + int((index + 0.5) * (last - first) / points) for index in range(points)]

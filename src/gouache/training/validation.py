"""The validation of a denoising objective: fixed pictures with fixed noise at a fixed grid of timesteps.

Nothing about it is random, so two validations differ by the weights alone. The loss is the mean squared error of the
network's output, without the weights that the training loss has, so that it can be compared between runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gouache.training.batch import Batch
from gouache.training.denoising import Denoising
from gouache.training.evaluation import evaluating
from gouache.training.objective import step_generator


@dataclass(frozen=True)
class Validation:
    """The losses of pictures that are not trained on, and of a few that are.

    `held_out` gives "loss" and "loss at T" for each of `points` timesteps, `probe`, a sample of the training pictures,
    "training loss". Without held-out pictures, as for tiny sets, "loss" and "loss at T" are those of the probe.
    """

    objective: Denoising
    held_out: Sequence[Batch] = ()
    probe: Sequence[Batch] = ()
    points: int = 8

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
    for index, batch in enumerate(batches):
        for column, t in enumerate(times):
            # Numbers below 0 belong to no training step.
            generator = step_generator(objective.seed, -1 - (index * len(times) + column))
            noise = torch.randn(batch.latents.shape, generator=generator).to(batch.latents)
            error = objective.squared_error(batch, torch.full((len(batch),), t), noise)
            sums[column] += error.double().sum().cpu()
    means = (sums / max(1, count)).tolist()
    return {"loss": sum(means) / len(means), **{f"loss at {t}": mean for t, mean in zip(times, means)}}


def timestep_grid(objective: Denoising, points: int) -> list[int]:
    """The middles of `points` equal parts of the timesteps that are trained."""
    first, last = objective.timesteps.first, objective.timesteps.last or len(objective.schedule.sigmas)
    points = min(points, last - first)
    return [first + int((index + 0.5) * (last - first) / points) for index in range(points)]

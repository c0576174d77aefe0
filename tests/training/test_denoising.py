"""The denoising objective: against diffusers' way of training, against the Gaussian whose denoiser is known."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.denoiser import Denoiser
from gouache.diffusion.schedule import Schedule
from gouache.training.denoising import Captioned, Denoising
from gouache.training.loop import train
from gouache.training.objective import chance

from .toys import settings

SCHEDULE = Schedule.scaled_linear()


class Stub(nn.Module):
    """Stands for a U-Net: remembers what it was told, says a fixed mixture of it."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.told.append((x, t, context))
        return 0.3 * x + context.mean() + t.reshape(-1, 1, 1, 1) / 1000


def objective(unet: nn.Module, **values: Any) -> Denoising:
    plain = {"schedule": SCHEDULE, "prediction": "v", "unsaid": Conditioning(torch.zeros(1, 3, 2)), "seed": 0}
    return Denoising(cast(Any, unet), **{**plain, **values})


def captioned(count: int, seed: int = 0) -> Captioned:
    drawn = torch.Generator().manual_seed(seed)
    said = Conditioning(1 + torch.rand(count, 3, 2, generator=drawn))
    return Captioned(torch.randn(count, 4, 2, 2, generator=drawn), said)


@pytest.mark.parametrize(("prediction", "name"), [("eps", "epsilon"), ("v", "v_prediction")])
@torch.no_grad()
def test_the_loss_of_each_image_is_the_min_snr_loss_of_diffusers_training_scripts(prediction, name):
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=name)
    batch = captioned(7)
    noise = torch.randn(batch.latents.shape, generator=chance(1, 1))
    t = torch.tensor([0, 1, 50, 300, 500, 900, 999])
    unet = Stub()

    found = objective(unet, prediction=prediction).loss(batch, t, noise, torch.zeros(7, dtype=torch.bool))

    noisy = scheduler.add_noise(batch.latents, noise, t)
    target = noise if prediction == "eps" else scheduler.get_velocity(batch.latents, noise, t)
    snr = compute_snr(scheduler, t)
    weight = snr.clamp(max=5.0) / (snr if prediction == "eps" else snr + 1)
    error = F.mse_loss(Stub()(noisy, t, batch.said.context), target, reduction="none").mean((1, 2, 3))
    assert_close(unet.told[0][0], noisy, atol=1e-4, rtol=1e-4)
    assert_close(unet.told[0][1], t.float(), atol=1e-2, rtol=0)
    assert_close(found, weight * error, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_a_channel_that_counts_four_times_is_all_the_loss_where_others_count_nothing():
    batch, t, silent = captioned(3), torch.tensor([10, 400, 900]), torch.zeros(3, dtype=torch.bool)
    noise = torch.randn(batch.latents.shape, generator=chance(1, 2))

    def loss(counts: list[float] | None) -> Tensor:
        asked = None if counts is None else torch.tensor(counts)
        return objective(Stub(), counts=asked).loss(batch, t, noise, silent)

    alone = [loss([4.0 * (channel == each) for channel in range(4)]) for each in range(4)]
    assert_close(loss(None), torch.stack(alone).mean(0))
    assert_close(loss([1.5, 1.5, 0.5, 0.5]), (1.5 * (alone[0] + alone[1]) + 0.5 * (alone[2] + alone[3])) / 4)
    assert (alone[0] - alone[1]).abs().min() > 1e-3


def test_a_tenth_of_the_captions_is_dropped_and_each_is_either_said_or_not():
    unet = Stub()

    objective(unet).losses(captioned(4000), 0)

    context = unet.told[0][2]
    dropped = (context == 0).flatten(1).all(1)
    assert torch.equal(context[~dropped], captioned(4000).said.context[~dropped])
    assert abs(float(dropped.float().mean()) - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5


def test_times_are_even_over_all_trained_levels_and_noise_is_standard_normal():
    unet = Stub()

    objective(unet).losses(Captioned(torch.zeros(8000, 4, 2, 2), captioned(8000).said), 0)

    x, t, _ = unet.told[0]
    counts = t.round().long().div(100, rounding_mode="floor").bincount(minlength=10)
    assert int(t.min()) >= 0 and int(t.max()) <= 999
    assert len(counts) == 10 and (counts - 800).abs().max() < 5 * 800**0.5
    sigma = SCHEDULE.sigma(t).reshape(-1, 1, 1, 1)
    noise = x * (1 + sigma**2).sqrt() / sigma
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02


def test_a_step_repeats_itself_and_differs_from_other_steps_and_seeds():
    batch = captioned(16)

    def loss(seed: int, step: int) -> float:
        return float(objective(Stub(), seed=seed).losses(batch, step)["loss"])

    assert loss(0, 5) == loss(0, 5)
    assert len({loss(0, 5), loss(0, 6), loss(1, 5)}) == 3


class Affine(nn.Module):
    """What the best denoiser of a Gaussian is made of: a factor and an offset at each of a few times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(times))
        self.offset = nn.Parameter(torch.zeros(times))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        index = t.round().long()
        return self.factor[index].reshape(-1, 1, 1, 1) * x + self.offset[index].reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_training_on_a_gaussian_comes_to_its_known_denoiser(tmp_path, prediction):
    mean, deviation = 0.5, 0.8
    schedule = Schedule(torch.tensor([0.1, 0.3, 1.0, 3.0, 10.0]))
    net = Affine(times=5)

    def batch(number: int) -> Captioned:
        latents = mean + deviation * torch.randn(256, 1, 4, 4, generator=chance(7, number))
        return Captioned(latents, Conditioning(torch.zeros(256, 1, 1)))

    unsaid = Conditioning(torch.zeros(1, 1, 1))
    train(
        objective(net, schedule=schedule, prediction=prediction, unsaid=unsaid),
        batch,
        settings(steps=400, learning_rate=0.05, schedule="cosine", final_rate=0.0, weight_decay=0.0, clip_norm=100),
        tmp_path,
    )

    x = torch.linspace(-3, 3, 13).reshape(1, 1, 1, 13)
    learnt = Denoiser(lambda x, t: net(x, t, x), schedule, prediction)
    for sigma in schedule.sigmas:
        with torch.no_grad():
            found = learnt(x, sigma)
        # E[x0 | x] of a Gaussian under Gaussian noise
        expected = mean + deviation**2 / (deviation**2 + sigma**2) * (x - mean)
        assert_close(found, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_velocity_weights_make_the_loss_the_capped_error_of_the_picture(prediction):
    schedule = Schedule.scaled_linear()
    t = torch.tensor([10, 300, 600, 990])
    generator = torch.Generator().manual_seed(3)
    x0, noise, said = (torch.randn(4, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    objective = Denoising(None, schedule, prediction, None, seed=0, gamma=5.0, weighting="velocity")  # type: ignore[arg-type]

    weights = objective.weights(t).double()

    sigma = schedule.sigma(t).double()[:, None, None, None]
    wanted = noise if prediction == "eps" else (noise - sigma * x0) / (1 + sigma**2).sqrt()
    # The pictures that what is said, and what should be said, stand for in x = x0 + sigma * noise.
    x = x0 + sigma * noise
    if prediction == "eps":
        seen, right = x - sigma * said, x - sigma * wanted
    else:
        seen, right = (x / (1 + sigma**2) - sigma / (1 + sigma**2).sqrt() * each for each in (said, wanted))
    error = (seen - right).pow(2).mean((1, 2, 3))
    expected = (1 / sigma.flatten() ** 2 + 1).clamp_max(6) * error
    torch.testing.assert_close(weights * (said - wanted).pow(2).mean((1, 2, 3)), expected, rtol=1e-4, atol=0)

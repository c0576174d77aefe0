"""The denoising objective: its random choices, weights and conditioning, and a Gaussian with a known denoiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.denoiser import Denoiser
from gouache.diffusion.schedule import Schedule
from gouache.training.batch import Batch
from gouache.training.denoising import Denoising
from gouache.training.loop import train
from gouache.training.objective import Group, step_generator

from .toys import denoiser_factory, settings

SCHEDULE = Schedule.scaled_linear()


class Stub(nn.Module):
    """In place of a U-Net: records its inputs and returns a fixed mixture of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[tuple[Tensor, ...]] = []
        self.dtypes: list[torch.dtype] = []
        self.weight = nn.Parameter(torch.eye(2))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, *vector: Tensor) -> Tensor:
        self.inputs.append((x, t, context, *vector))
        self.dtypes.append((context @ self.weight).dtype)
        return 0.3 * x[:, :4] + context.mean() + t.reshape(-1, 1, 1, 1) / 1000


def objective(network: nn.Module, schedule: Schedule = SCHEDULE, prediction: Any = "v", **values: Any) -> Denoising:
    plain = {"unconditional": Conditioning(torch.zeros(1, 3, 2)), "seed": 0}
    factory = denoiser_factory(network, schedule, prediction)
    return Denoising(factory, {"net": network}, **{**plain, **values})


def captioned(count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    conditioning = Conditioning(1 + torch.rand(count, 3, 2, generator=generator))
    return Batch(torch.randn(count, 4, 2, 2, generator=generator), conditioning)


@pytest.mark.parametrize(("prediction", "name"), [("eps", "epsilon"), ("v", "v_prediction")])
@torch.no_grad()
def test_the_loss_per_image_is_the_min_snr_loss_of_diffusers_training_scripts(prediction, name):
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=name)
    batch = captioned(7)
    noise = torch.randn(batch.latents.shape, generator=step_generator(1, 1))
    t = torch.tensor([0, 1, 50, 300, 500, 900, 999])
    network = Stub()

    found = objective(network, prediction=prediction).loss(batch, t, noise, torch.zeros(7, dtype=torch.bool))

    noisy = scheduler.add_noise(batch.latents, noise, t)
    target = noise if prediction == "eps" else scheduler.get_velocity(batch.latents, noise, t)
    snr = compute_snr(scheduler, t)
    weight = snr.clamp(max=5.0) / (snr if prediction == "eps" else snr + 1)
    output = Stub()(noisy, t, batch.conditioning.context)
    error = F.mse_loss(output, target, reduction="none").mean((1, 2, 3))
    assert_close(network.inputs[0][0], noisy, atol=1e-4, rtol=1e-4)
    assert_close(network.inputs[0][1], t.float(), atol=1e-2, rtol=0)
    assert_close(found, weight * error, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_channel_weights_multiply_the_squared_errors_of_the_channels():
    batch, t, drop = captioned(3), torch.tensor([10, 400, 900]), torch.zeros(3, dtype=torch.bool)
    noise = torch.randn(batch.latents.shape, generator=step_generator(1, 2))

    def loss(weights: list[float] | None) -> Tensor:
        tensor = None if weights is None else torch.tensor(weights)
        return objective(Stub(), channel_weights=tensor).loss(batch, t, noise, drop)

    single = [loss([4.0 * (channel == each) for channel in range(4)]) for each in range(4)]
    assert_close(loss(None), torch.stack(single).mean(0))
    assert_close(loss([1.5, 1.5, 0.5, 0.5]), (1.5 * (single[0] + single[1]) + 0.5 * (single[2] + single[3])) / 4)
    assert (single[0] - single[1]).abs().min() > 1e-3


def test_a_tenth_of_the_conditionings_is_replaced_by_the_unconditional_one_and_the_others_are_unchanged():
    network = Stub()

    objective(network).losses(captioned(4000), 0)

    context = network.inputs[0][2]
    dropped = (context == 0).flatten(1).all(1)
    assert torch.equal(context[~dropped], captioned(4000).conditioning.context[~dropped])
    assert abs(float(dropped.float().mean()) - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5


@torch.no_grad()
def test_a_dropped_row_loses_context_and_vector_together_and_keeps_its_concat_channels():
    network, count = Stub(), 6
    generator = torch.Generator().manual_seed(2)
    context, vector = torch.rand(count, 3, 2, generator=generator), torch.rand(count, 5, generator=generator)
    concat = torch.rand(count, 5, 2, 2, generator=generator)
    batch = Batch(torch.zeros(count, 4, 2, 2), Conditioning(context, vector, concat))
    unconditional = Conditioning(torch.full((1, 3, 2), -1.0), torch.full((1, 5), -2.0))
    drop = torch.tensor([True, False, True, True, False, False])

    objective(network, unconditional=unconditional).loss(batch, torch.arange(count), torch.zeros(count, 4, 2, 2), drop)

    x, _, seen_context, seen_vector = network.inputs[0]
    assert torch.equal(seen_context, torch.where(drop[:, None, None], torch.tensor(-1.0), context))
    assert torch.equal(seen_vector, torch.where(drop[:, None], torch.tensor(-2.0), vector))
    assert torch.equal(x[:, 4:], concat)


def test_timesteps_are_uniform_over_all_levels_and_noise_is_standard_normal():
    network = Stub()

    objective(network).losses(Batch(torch.zeros(8000, 4, 2, 2), captioned(8000).conditioning), 0)

    x, t, _ = network.inputs[0]
    histogram = t.round().long().div(100, rounding_mode="floor").bincount(minlength=10)
    assert int(t.min()) >= 0 and int(t.max()) <= 999
    assert len(histogram) == 10 and (histogram - 800).abs().max() < 5 * 800**0.5
    sigma = SCHEDULE.sigma(t).reshape(-1, 1, 1, 1)
    noise = x * (1 + sigma**2).sqrt() / sigma
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02


def test_a_step_is_reproducible_and_differs_from_other_steps_and_seeds():
    batch = captioned(16)

    def loss(seed: int, step: int) -> float:
        return float(objective(Stub(), seed=seed).losses(batch, step)["loss"])

    assert loss(0, 5) == loss(0, 5)
    assert len({loss(0, 5), loss(0, 6), loss(1, 5)}) == 3


def test_autocast_runs_only_the_network_in_bfloat16():
    exact, reduced = Stub(), Stub()
    batch = captioned(4)

    loss = objective(exact).losses(batch, 0)["loss"]
    loss_bf16 = objective(reduced, autocast=True).losses(batch, 0)["loss"]

    assert exact.dtypes == [torch.float32] and reduced.dtypes == [torch.bfloat16]
    assert torch.equal(exact.inputs[0][0], reduced.inputs[0][0])
    assert loss_bf16.dtype == torch.float32
    assert_close(loss_bf16, loss)


def test_schedule_and_prediction_are_those_of_the_denoiser():
    schedule = SCHEDULE.zero_terminal_snr()

    found = objective(Stub(), schedule=schedule, prediction="eps")

    assert found.schedule is schedule and found.prediction == "eps"


def test_trained_parameters_are_those_of_the_networks_or_the_given_groups():
    network = Stub()
    factors = nn.Parameter(torch.zeros(2, 2))
    group = Group({"lora.down": factors}, rate=2.0)

    assert [list(each.parameters) for each in objective(network).parameter_groups()] == [["net.weight"], []]
    assert objective(network, groups=(group,)).parameter_groups() == [group]


class Affine(nn.Module):
    """The form of the best denoiser of a Gaussian: a factor and an offset at each of a few timesteps."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(times))
        self.offset = nn.Parameter(torch.zeros(times))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        index = t.round().long()
        return self.factor[index].reshape(-1, 1, 1, 1) * x + self.offset[index].reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_training_on_a_gaussian_converges_to_its_known_denoiser(tmp_path, prediction):
    mean, deviation = 0.5, 0.8
    schedule = Schedule(torch.tensor([0.1, 0.3, 1.0, 3.0, 10.0]))
    network = Affine(times=5)

    def batch(number: int) -> Batch:
        latents = mean + deviation * torch.randn(256, 1, 4, 4, generator=step_generator(7, number))
        return Batch(latents, Conditioning(torch.zeros(256, 1, 1)))

    train(
        objective(network, schedule, prediction, unconditional=Conditioning(torch.zeros(1, 1, 1))),
        batch,
        settings(steps=400, learning_rate=0.05, schedule="cosine", final_rate=0.0, weight_decay=0.0, clip_norm=100),
        tmp_path,
    )

    x = torch.linspace(-3, 3, 13).reshape(1, 1, 1, 13)
    learned = Denoiser(lambda x, t: network(x, t, x), schedule, prediction)
    for sigma in schedule.sigmas:
        with torch.no_grad():
            found = learned(x, sigma)
        # E[x0 | x] of a Gaussian under Gaussian noise
        expected = mean + deviation**2 / (deviation**2 + sigma**2) * (x - mean)
        assert_close(found, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_velocity_weights_make_the_loss_the_capped_error_of_x0(prediction):
    t = torch.tensor([10, 300, 600, 990])
    generator = torch.Generator().manual_seed(3)
    x0, noise, output = (torch.randn(4, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))

    weights = objective(Stub(), SCHEDULE, prediction, gamma=5.0, weighting="velocity").loss_weights(t).double()

    sigma = SCHEDULE.sigma(t).double()[:, None, None, None]
    target = noise if prediction == "eps" else (noise - sigma * x0) / (1 + sigma**2).sqrt()
    # Output and target as estimates of x0, where x = x0 + sigma * noise.
    x = x0 + sigma * noise
    if prediction == "eps":
        estimates = x - sigma * output, x - sigma * target
    else:
        estimates = tuple(x / (1 + sigma**2) - sigma / (1 + sigma**2).sqrt() * each for each in (output, target))
    error = (estimates[0] - estimates[1]).pow(2).mean((1, 2, 3))
    expected = (1 / sigma.flatten() ** 2 + 1).clamp_max(6) * error
    assert_close(weights * (output - target).pow(2).mean((1, 2, 3)), expected, rtol=1e-4, atol=0)

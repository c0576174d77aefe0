from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from gouache.diffusion.denoiser import Denoiser, add_noise, min_snr, target
from gouache.diffusion.schedule import Schedule
from gouache.errors import RequestError

SCHEDULE = Schedule.scaled_linear()
DIFFUSERS_NAME = {"eps": "epsilon", "v": "v_prediction"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_x0_is_that_of_diffusers_for_the_same_network_output(prediction):
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=DIFFUSERS_NAME[prediction],
        clip_sample=False,
    )
    scheduler.set_timesteps(20)
    x_vp, output = normal(2, 4, 5, 5), normal(2, 4, 5, 5, seed=1)
    sigma = SCHEDULE.sigma(651)

    x0 = Denoiser(lambda x, t: output, SCHEDULE, prediction)(x_vp * (1 + sigma**2).sqrt(), sigma)

    theirs = scheduler.step(output, 651, x_vp).pred_original_sample
    torch.testing.assert_close(x0, theirs, rtol=1e-4, atol=1e-4)


def test_the_network_receives_variance_preserving_x_and_an_integer_timestep_at_a_trained_level():
    inputs = []
    x_vp, sigma = normal(3, 4, 2, 2), SCHEDULE.sigma(951)

    Denoiser(lambda x, t: inputs.append((x, t)) or x, SCHEDULE)(x_vp * (1 + sigma**2).sqrt(), sigma)

    torch.testing.assert_close(inputs[0][0], x_vp)
    assert torch.equal(inputs[0][1], torch.tensor([951.0, 951.0, 951.0]))


def test_a_scalar_sigma_equals_the_same_sigma_per_image():
    denoiser = Denoiser(lambda x, t: x * t.reshape(-1, 1, 1, 1) / 1000, SCHEDULE, "v")
    x = normal(3, 4, 2, 2)

    assert torch.equal(denoiser(x, torch.tensor(2.5)), denoiser(x, torch.full((3,), 2.5)))


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6, 4518.0])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_network_that_predicts_the_training_target_returns_the_training_x0(prediction, sigma):
    x0, noise, level = normal(2, 1, 3, 3).double(), normal(2, 1, 3, 3, seed=1).double(), torch.tensor([sigma, sigma])
    perfect = Denoiser(lambda x, t: target(prediction, x0, noise, level), SCHEDULE, prediction)

    torch.testing.assert_close(perfect(add_noise(x0, noise, level), level), x0)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_training_target_equals_that_of_diffusers(prediction):
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x0, noise, t = normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=1), torch.tensor([3, 500, 990])

    predicted, expected = Denoiser(lambda x, t: x, SCHEDULE, prediction).loss_terms(x0, noise, SCHEDULE.sigma(t))

    torch.testing.assert_close(predicted, scheduler.add_noise(x0, noise, t), rtol=1e-4, atol=1e-4)
    theirs = noise if prediction == "eps" else scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(expected, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arithmetic_outside_a_half_precision_network_is_float32(dtype):
    def network(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return torch.zeros_like(x, dtype=dtype)

    x = normal(1, 4, 2, 2) * 14

    x0 = Denoiser(network, SCHEDULE)(x, torch.tensor(14.0))

    assert torch.equal(x0, x)  # float16 or bfloat16 arithmetic would have rounded it


def test_min_snr_gives_the_same_weight_to_an_x0_error_for_both_predictions():
    sigma = torch.tensor([0.05, 0.3, 1.0, 5.0, 14.6], dtype=torch.float64)
    snr, error = 1 / sigma**2, torch.tensor(0.1, dtype=torch.float64)
    zero = torch.zeros_like(sigma).reshape(-1, 1, 1, 1)

    for prediction in ("eps", "v"):
        # The change of the target for a change of x0 at constant x: noise = (x - x0) / sigma.
        change = target(prediction, zero + error, zero - error / sigma.reshape(-1, 1, 1, 1), sigma).flatten()
        loss = min_snr(snr, 5.0, prediction) * change**2
        torch.testing.assert_close(loss, snr.clamp_max(5.0) * error**2)


def test_min_snr_is_finite_at_zero_snr():
    assert min_snr(torch.zeros(1), 5.0, "eps").tolist() == [1.0]
    assert min_snr(torch.zeros(1), 5.0, "v").tolist() == [0.0]


def test_an_unknown_prediction_is_named_in_the_error():
    with pytest.raises(RequestError, match="'x0'"):
        Denoiser(lambda x, t: x, SCHEDULE, "x0")(normal(1, 1, 1, 1), torch.tensor(1.0))

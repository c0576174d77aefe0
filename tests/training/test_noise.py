"""The noise of a step: white noise unchanged, and each option compared with its formula or its known deviation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from gouache.training.noise import NoiseOptions, sample_noise
from gouache.training.objective import step_generator

LATENTS = torch.randn(3, 4, 12, 16, generator=torch.Generator().manual_seed(8)) + 0.5


def sample(latents: Tensor = LATENTS, **options) -> tuple[Tensor, Tensor]:
    return sample_noise(latents, NoiseOptions(**options), step_generator(0, 1))


def white(latents: Tensor = LATENTS) -> Tensor:
    return torch.randn(latents.shape, generator=step_generator(0, 1))


def test_without_options_target_and_input_have_the_same_white_noise():
    noise, input_noise = sample()

    assert torch.equal(noise, white()) and torch.equal(input_noise, noise)


def test_an_offset_adds_a_constant_per_channel_with_its_deviation():
    many = torch.zeros(4000, 4, 2, 2)
    noise, input_noise = sample(many, offset=0.3)

    added = noise - white(many)
    assert_close(added, added[:, :, :1, :1].expand_as(added), atol=1e-6, rtol=0)
    assert abs(float(added[:, :, 0, 0].std()) - 0.3) < 0.01 and abs(float(added.mean())) < 0.01
    assert torch.equal(input_noise, noise)


def test_the_adaptive_part_of_an_offset_grows_with_the_mean_of_the_latents():
    generator = step_generator(0, 1)
    expected = torch.randn(LATENTS.shape, generator=generator)
    constant = torch.randn(3, 4, 1, 1, generator=generator)
    expected = expected + (0.1 + 0.5 * LATENTS.mean((2, 3), keepdim=True).abs()) * constant

    assert_close(sample(offset=0.1, offset_adaptive=0.5)[0], expected)
    # never below 0
    assert_close(sample(offset=0.1, offset_adaptive=-99.0)[0], white())


def test_a_random_offset_has_a_uniform_share_of_its_strength_per_picture():
    many = torch.zeros(20_000, 1, 1, 1)
    added = (sample(many, offset=0.3, offset_random=True)[0] - white(many)).flatten()

    # E[(s U Z)^2] = s^2 / 3 and E[(s U Z)^4] = 3 s^4 / 5
    assert abs(float(added.pow(2).mean()) / (0.09 / 3) - 1) < 0.05
    assert abs(float(added.pow(4).mean()) / (3 * 0.0081 / 5) - 1) < 0.15


def test_pyramid_noise_is_the_sum_of_kohyas_scripts_scaled_per_picture():
    generator = step_generator(0, 1)
    expected = torch.randn(LATENTS.shape, generator=generator)
    for level in range(6):
        ratio = float(torch.rand((), generator=generator)) * 2 + 2
        height, width = max(1, int(12 / ratio**level)), max(1, int(16 / ratio**level))
        coarse = torch.randn(3, 4, height, width, generator=generator)
        expected += torch.nn.Upsample(size=(12, 16), mode="bilinear")(coarse) * 0.4**level
        if height == 1 or width == 1:
            break
    expected = torch.stack([each / each.std() for each in expected])

    assert_close(sample(pyramid_iterations=6, pyramid_discount=0.4)[0], expected)


def test_pyramid_noise_has_more_power_in_its_coarse_parts():
    many = torch.zeros(200, 4, 32, 32)
    noise, _ = sample(many, pyramid_iterations=8, pyramid_discount=0.8)

    coarse = lambda x: float(F.avg_pool2d(x, 16).var())  # noqa: E731
    assert coarse(noise) > 5 * coarse(white(many))
    assert_close(noise.std((1, 2, 3)), torch.ones(200))


def test_a_perturbation_is_only_in_the_input():
    many = torch.zeros(500, 4, 4, 4)
    noise, input_noise = sample(many, perturbation=0.1)

    assert torch.equal(noise, white(many))
    added = input_noise - noise
    assert abs(float(added.std()) - 0.1) < 0.002
    assert abs(float((added * noise).mean())) < 0.002
    random = sample(many, perturbation=0.1, perturbation_random=True)[1] - noise
    shares = random.std((1, 2, 3))
    assert float(shares.min()) < 0.01 and 0.09 < float(shares.max()) < 0.12


def test_noise_of_latents_in_half_precision_is_float32_and_uses_no_global_generator():
    before = torch.get_rng_state()

    noise, _ = sample(LATENTS.half(), offset=0.1, pyramid_iterations=3, perturbation=0.1, offset_random=True)

    assert noise.dtype == torch.float32
    assert torch.equal(before, torch.get_rng_state())

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.denoiser import Denoiser
from gouache.diffusion.guidance import cfg, instruct, masked
from gouache.diffusion.noise import Noise
from gouache.diffusion.samplers.catalog import SAMPLERS, plan
from gouache.diffusion.schedule import Schedule

from .mixture import mixture

SCHEDULE = Schedule.scaled_linear()


class RecordingDenoiser:
    """A conditioned denoiser whose x0 depends on the mean of the row's context and on concat; records batch sizes."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        assert len(x) == len(conditioning) and sigma.numel() in (1, len(x))
        self.rows.append(len(x))
        x0 = 0.9 * x + conditioning.context.mean(dim=(1, 2)).reshape(-1, 1, 1, 1) * sigma.reshape(-1, 1, 1, 1)
        return x0 if conditioning.concat is None else x0 + 10 * conditioning.concat


def constant(value: float, rows: int = 2, tokens: int = 77, concat: float | None = None) -> Conditioning:
    extra = None if concat is None else torch.full((rows, 4, 3, 3), concat)
    return Conditioning(torch.full((rows, tokens, 8), value), concat=extra)


def x_of(rows: int = 2) -> Tensor:
    return torch.randn((rows, 4, 3, 3), generator=torch.Generator().manual_seed(3))


SIGMA = torch.tensor(2.0)


def test_cfg_extrapolates_from_the_negative_through_the_positive_in_one_call():
    denoise, x = RecordingDenoiser(), x_of()

    x0 = cfg(denoise, constant(1.0), constant(0.25), 7.0)(x, SIGMA)

    torch.testing.assert_close(x0, 0.9 * x + (0.25 + 7 * (1.0 - 0.25)) * 2)
    assert denoise.rows == [4]


def test_prompts_of_different_lengths_need_two_calls():
    denoise, x = RecordingDenoiser(), x_of()

    x0 = cfg(denoise, constant(1.0, tokens=154), constant(0.25), 7.0)(x, SIGMA)

    torch.testing.assert_close(x0, 0.9 * x + 5.5 * 2)
    assert denoise.rows == [2, 2]


@pytest.mark.parametrize(("negative", "scale"), [(constant(0.25), 1.0), (None, 7.0)])
def test_at_scale_one_or_without_a_negative_only_the_positive_is_computed(negative, scale):
    denoise, x = RecordingDenoiser(), x_of()

    x0 = cfg(denoise, constant(1.0), negative, scale)(x, SIGMA)

    torch.testing.assert_close(x0, 0.9 * x + 2)
    assert denoise.rows == [2]


def test_one_sigma_per_image_applies_to_both_halves_of_the_batch():
    x, sigma = x_of(), torch.tensor([2.0, 5.0])

    x0 = cfg(RecordingDenoiser(), constant(1.0), constant(0.25), 7.0)(x, sigma)

    torch.testing.assert_close(x0, 0.9 * x + 5.5 * sigma.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("phi", [0.7, 1.0])
def test_rescaling_applies_to_the_network_output_as_defined_by_lin_et_al(prediction, phi):
    outputs = {1.0: x_of(4)[:2], 0.25: x_of(4)[2:]}

    def denoise(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        rows = conditioning.context[:, 0, 0].tolist()
        output = torch.cat([outputs[row][index % 2 : index % 2 + 1] for index, row in enumerate(rows)])
        return Denoiser(lambda x_in, t: output, SCHEDULE, prediction)(x, sigma)

    x = x_of() * 2.2

    x0 = cfg(denoise, constant(1.0), constant(0.25), 7.0, rescale=phi, prediction=prediction)(x, SIGMA)

    guided = outputs[0.25] + 7 * (outputs[1.0] - outputs[0.25])
    deviations = [each.flatten(1).std(dim=1).reshape(-1, 1, 1, 1) for each in (outputs[1.0], guided)]
    output = phi * guided * deviations[0] / deviations[1] + (1 - phi) * guided
    expected = Denoiser(lambda x_in, t: output, SCHEDULE, prediction)(x, SIGMA)
    torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-4)


def test_instruct_pix2pix_guides_by_text_and_image_in_one_call():
    denoise, x = RecordingDenoiser(), x_of()

    x0 = instruct(denoise, constant(1.0, concat=0.5), constant(0.25, concat=0.5), 7.0, 1.5)(x, SIGMA)

    # the text adds 7 times its change, the image 1.5 times its change (10 * 0.5)
    torch.testing.assert_close(x0, 0.9 * x + 0.25 * 2 + 7 * (1.0 - 0.25) * 2 + 1.5 * 5)
    assert denoise.rows == [6]


@pytest.mark.parametrize("info", SAMPLERS, ids=lambda info: info.name)
def test_a_masked_run_keeps_the_original_outside_the_mask_and_samples_inside(info):
    original = torch.full((1, 1, 4, 4), 0.77)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    sigmas = plan(info, info.spacing, SCHEDULE, 8)
    noise = Noise([5], (1, 4, 4))
    painted = info.function(mixture, original + sigmas[0] * noise.start(), sigmas, noise=noise)

    x = info.function(
        masked(mixture, mask, original),
        original + sigmas[0] * Noise([5], (1, 4, 4)).start(),
        sigmas,
        noise=Noise([5], (1, 4, 4)),
    )

    assert (x - original)[..., 2:].abs().max() <= 4 * sigmas[-1] + 1e-5
    torch.testing.assert_close(x[..., :2], painted[..., :2], rtol=0, atol=1e-4)

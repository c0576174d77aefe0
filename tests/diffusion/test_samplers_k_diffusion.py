"""Samplers compared with recorded runs of k-diffusion: x0 at each step, the result, the noise requested."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gouache.diffusion.samplers.dpm import dpm2, dpm2_ancestral
from gouache.diffusion.samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s_ancestral, dpmpp_3m_sde, dpmpp_sde
from gouache.diffusion.samplers.euler import euler, euler_ancestral, heun
from gouache.diffusion.samplers.lms import lms
from gouache.diffusion.samplers.sampler import Step

from .mixture import mixture
from .recorded import recorded

CHURN = {"s_churn": 3.0, "s_tmin": 0.2, "s_tmax": 10.0, "s_noise": 1.01}
REDUCED_ETA = {"eta": 0.6, "s_noise": 1.02}
CASES: dict[str, tuple[Callable[..., Tensor], dict]] = {
    "euler": (euler, {}),
    "euler churn": (euler, CHURN),
    "euler_ancestral": (euler_ancestral, {}),
    "euler_ancestral eta": (euler_ancestral, REDUCED_ETA),
    "heun": (heun, {}),
    "heun churn": (heun, CHURN),
    "dpm2": (dpm2, {}),
    "dpm2 churn": (dpm2, CHURN),
    "dpm2_ancestral": (dpm2_ancestral, {}),
    "dpm2_ancestral eta": (dpm2_ancestral, REDUCED_ETA),
    "lms": (lms, {}),
    "lms order": (lms, {"order": 3}),
    "dpmpp_2s_ancestral": (dpmpp_2s_ancestral, {}),
    "dpmpp_2s_ancestral eta": (dpmpp_2s_ancestral, REDUCED_ETA),
    "dpmpp_2m": (dpmpp_2m, {}),
    "dpmpp_sde": (dpmpp_sde, {}),
    "dpmpp_sde eta": (dpmpp_sde, {**REDUCED_ETA, "r": 0.4}),
    "dpmpp_2m_sde": (dpmpp_2m_sde, {}),
    "dpmpp_2m_sde heun": (dpmpp_2m_sde, {**REDUCED_ETA, "solver_type": "heun"}),
    "dpmpp_3m_sde": (dpmpp_3m_sde, {}),
    "dpmpp_3m_sde eta": (dpmpp_3m_sde, REDUCED_ETA),
}
# Without churn k-diffusion generates noise for these at every step without using it.
UNUSED_NOISE = ("euler", "heun", "dpm2")


class ReplayedNoise:
    """Replays the recorded noise in order, and checks that it is requested for the recorded levels."""

    def __init__(self, case: dict[str, Tensor]) -> None:
        self.remaining = list(zip(case.get("noise", ()), case.get("levels", ())))

    def draw(self) -> Tensor:
        return self.remaining.pop(0)[0]

    def between(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        noise, levels = self.remaining.pop(0)
        torch.testing.assert_close(torch.stack([sigma, sigma_next]), levels, check_dtype=False)
        return noise


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_steps_and_noise_equal_those_of_k_diffusion(name, dtype):
    sampler, settings = CASES[name]
    case, shared = recorded(name), recorded("")
    steps: list[Step] = []
    noise = ReplayedNoise({key: tensor.to(dtype) for key, tensor in case.items()})

    x = sampler(
        mixture, shared["x"].to(dtype), shared["sigmas"].to(dtype), noise=noise, on_step=steps.append, **settings
    )

    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for step, theirs in zip(steps, case["denoised"], strict=True):
        torch.testing.assert_close(step.denoised, theirs.to(dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x, case["x"].to(dtype), rtol=tolerance, atol=tolerance)
    if name not in UNUSED_NOISE:
        assert noise.remaining == []


@pytest.mark.parametrize("name", UNUSED_NOISE)
def test_no_noise_is_requested_without_churn(name):
    shared = recorded("")
    steps: list[Step] = []

    CASES[name][0](mixture, shared["x"], shared["sigmas"], noise=ReplayedNoise({}), on_step=steps.append)

    assert [step.index for step in steps] == list(range(8)) and {step.count for step in steps} == {8}
    assert [step.sigma for step in steps] == shared["sigmas"][:-1].tolist()
